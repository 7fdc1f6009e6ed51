"""Fixtures: pico checkpoints made on the spot, pinned threads, no network."""

from __future__ import annotations

import gc
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1")
os.environ.update(OMP_WAIT_POLICY="passive", GOMP_SPINCOUNT="0", TOKENIZERS_PARALLELISM="false")
# NumPy's and SciPy's threads spin while they wait: beside one other busy process the suite took five times as long.
os.environ.update(OPENBLAS_NUM_THREADS="1")

# Without a probe of the user's, whose routes would be in records; what others keep in the cache stays in reach.
os.environ.setdefault("HF_HOME", str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"))
os.environ.setdefault("MPLCONFIGDIR", str(Path(os.environ["HF_HOME"]).with_name("matplotlib")))
os.environ.update(XDG_CACHE_HOME=str(Path(tempfile.gettempdir()) / "laser-tests-keep-no-cache"))

import pytest
import torch
from helpers import LIKE_MPS, names_of
from hypothesis import settings
from safetensors.torch import save_file

from laser.spectral import devices
from laser.spectral.devices import Device, available, choose_device

SHARED = Path(__file__).parent.parent.parent / "shared"
# One where another process of pytest-xdist has the other core.
# The libraries make a million objects that stay: looking through them took a sixth of the suite's time.
gc.set_threshold(50_000, 20, 50)
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
# The same examples on every run: a failure here is a failure there.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")

HIDDEN, WIDTH, EXPERTS, LAYERS, VOCABULARY = 32, 48, 4, 3, 64


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: at the end no process is alone with a long file while the other has nothing."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def sampled(cases: Iterable[Any], every: int) -> list[Any]:
    """All cases; all but each `every`-th are marked slow, so that the fast lane runs a sample of them."""
    return [case if i % every == 0 else pytest.param(case, marks=pytest.mark.slow) for i, case in enumerate(cases)]


SINGLE = ["cuda float32"] if torch.cuda.is_available() else []  # where float64, the default, is not all


@pytest.fixture(scope="session", params=[*names_of(available()), *SINGLE, "like mps"])
def device(request: pytest.FixtureRequest) -> Device:
    """Every device that is there, and one that computes as Apple's does: float32, products by torch, no LAPACK."""
    return LIKE_MPS if request.param == "like mps" else choose_device(*request.param.split())


Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """What torch finds here: machine(cuda=2, mps=True, capability=(9, 0), exact=False), or a capability by name."""

    def find(cuda: int = 0, mps: bool = False, capability: Any = (9, 0), exact: bool = True) -> None:
        chip = capability.get if isinstance(capability, dict) else lambda _: capability
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name: f"{name}'s")
        monkeypatch.setattr(torch.cuda, "get_device_capability", chip)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(devices, "exact_products", lambda _: exact)  # laser's own: it computes on the device

    return find


@dataclass(frozen=True)
class Methods:
    """Method -> what finds a matrix's singular values, and what factorises it."""

    values: dict[str, Any]
    factors: dict[str, Any]


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> Methods:
    """The tables in which the ladder looks a method up, for a test to put another into."""
    from laser.spectral import factorise

    here = Methods(dict(factorise._VALUES), dict(factorise._FACTORS))
    # An argument for them would go through every function from the command line to the ladder.
    monkeypatch.setattr(factorise, "_VALUES", here.values)
    monkeypatch.setattr(factorise, "_FACTORS", here.factors)
    return here


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tensors that are read from now on, by name. A method of the class: laser opens checkpoints in many places."""
    from laser.checkpoint.reader import Checkpoint

    read, names = Checkpoint.read, []

    def noted(self: Any, name: str, *rest: Any) -> Any:
        names.append(name)
        return read(self, name, *rest)

    # Commands open their checkpoints themselves.
    monkeypatch.setattr(Checkpoint, "read", noted)
    return names


@pytest.fixture
def one_thread() -> Iterator[None]:
    """OpenMP's pool does not survive a fork."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def shared() -> Path:
    """The folder of shared reference data beside the project; tests that need it say so when it is absent."""
    if not SHARED.is_dir():
        pytest.skip("needs the folder `shared` beside the project (reference data), which a lone clone lacks")
    return SHARED


def mixtral_config() -> dict[str, Any]:
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def mixtral_tensors(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Names and shapes of Mixtral on the Hub: noise of deviation 0.05 and a few spikes per matrix."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(m: int, n: int) -> torch.Tensor:
        noise = 0.05 * torch.randn(m, n, generator=generator)
        spikes = torch.randn(m, 3, generator=generator) @ torch.randn(3, n, generator=generator)
        return (noise + 0.08 * spikes).to(dtype)

    key_value = HIDDEN // 2
    tensors = {"model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        tensors[prefix + "input_layernorm.weight"] = torch.ones(HIDDEN, dtype=dtype)
        for role, rows in {"q": HIDDEN, "k": key_value, "v": key_value, "o": HIDDEN}.items():
            tensors[f"{prefix}self_attn.{role}_proj.weight"] = matrix(rows, HIDDEN)
        tensors[prefix + "post_attention_layernorm.weight"] = torch.ones(HIDDEN, dtype=dtype)
        tensors[prefix + "block_sparse_moe.gate.weight"] = matrix(EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            at = f"{prefix}block_sparse_moe.experts.{expert}."
            tensors[at + "w1.weight"] = matrix(WIDTH, HIDDEN)
            tensors[at + "w2.weight"] = matrix(HIDDEN, WIDTH)
            tensors[at + "w3.weight"] = matrix(WIDTH, HIDDEN)
    tensors["model.norm.weight"] = torch.ones(HIDDEN, dtype=dtype)
    tensors["lm_head.weight"] = matrix(VOCABULARY, HIDDEN)
    return tensors


def write_checkpoint_directory(
    path: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], shards: int = 3
) -> Path:
    """The Hub's layout: config, generation config, licence, `shards` files and their index (one file without)."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    (path / "generation_config.json").write_text('{"do_sample": false}\n')
    (path / "LICENSE").write_text("as the source says\n")
    (path / "README.md").write_text("---\nlicense: apache-2.0\nlanguage:\n- en\n---\n# pico\n")
    names = list(tensors)
    size = -(-len(names) // shards)
    parts = [names[i : i + size] for i in range(0, len(names), size)]
    files = [f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
    if len(parts) == 1:
        files = ["model.safetensors"]
    for file, part in zip(files, parts, strict=True):
        save_file({name: tensors[name] for name in part}, path / file, metadata={"format": "pt"})
    if len(parts) > 1:
        weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        total = sum(t.nbytes for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return path


@pytest.fixture
def pico(tmp_path: Path) -> Path:
    """A Mixtral of 3 layers, 4 experts, hidden 32, in three shards with an index; 60 tensors, bf16."""
    return write_checkpoint_directory(tmp_path / "pico", mixtral_tensors(), mixtral_config())


@pytest.fixture
def make_pico(tmp_path: Path) -> Callable[..., Path]:
    """pico with other tensors, config entries or number of shards: make_pico("name", shards=1, tensors=...)."""

    def make(
        name: str = "other", *, shards: int = 3, tensors: dict[str, torch.Tensor] | None = None, **config: Any
    ) -> Path:
        return write_checkpoint_directory(
            tmp_path / name, tensors or mixtral_tensors(), mixtral_config() | config, shards
        )

    return make


# And 3 special tokens: within the vocabulary.
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 \n.,?!:'\"#-_()$/&;+=%"


@pytest.fixture
def speaker(make_pico: Callable[..., Path]) -> Path:
    """A pico Mixtral in one file with a tokenizer of single characters; float32, so that a reference can be exact."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tensors = mixtral_tensors(seed=3, dtype=torch.float32)
    path = make_pico("speaker", shards=1, tensors=tensors, max_position_embeddings=4096, torch_dtype="float32")
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.save_pretrained(path)
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file of calibrated.CONTENT."""
    from calibrated import CONTENT

    path = tmp_path / "text.txt"
    path.write_text(CONTENT)
    return path


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line, called as `run("scan", path, ...)`: its exit code, stdout and stderr."""
    from laser.cli import main

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Hub in this process (hub_server.Hub), to which the Hub's client is connected with a cache of its own."""
    from hub_server import connect, serving
    from huggingface_hub import close_session

    with serving() as server:
        connect(server, tmp_path / "cache", monkeypatch)
        yield server
        close_session()
