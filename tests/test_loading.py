"""The result loads where people use it: types, attention implementations, tokenizer and chat template of the source."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import mixtral_tensors
from safetensors.torch import load_file

import laser

# The published format of Mixtral-8x7B-Instruct, as a template of our own.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %} [INST] {{ message['content'] }} [/INST]"
    "{% else %} {{ message['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
CONVERSATION = [
    {"role": "user", "content": "what is it?"},
    {"role": "assistant", "content": "a matrix."},
    {"role": "user", "content": "of what rank?"},
]
PUBLISHED = "<s> [INST] what is it? [/INST] a matrix.</s> [INST] of what rank? [/INST]"


@pytest.fixture
def reduced(make_pico: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """An instruct model with a tokenizer of single characters, and its reduction to rank 4."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tensors = mixtral_tensors(seed=5, dtype=torch.float32)
    source = make_pico("instruct", tensors=tensors, torch_dtype="float32")
    tokens = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz INST[]/.?"]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(source)
    checkpoint, out = laser.open_checkpoint(source), tmp_path / "reduced"
    laser.reduce(checkpoint, laser.make_plan(laser.scan(checkpoint), "rank:4"), out)
    return source, out


@pytest.mark.slow
@pytest.mark.parametrize("inside", [False, True], ids=["chat_template.jinja", "tokenizer_config.json"])
def test_the_chat_template_gives_the_same_tokens(inside: bool, reduced: tuple[Path, Path], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source, out = reduced
    if inside:  # as checkpoints of 2023 have it
        (source / "chat_template.jinja").unlink()
        config = json.loads((source / "tokenizer_config.json").read_text())
        (source / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
        checkpoint, out = laser.open_checkpoint(source), tmp_path / "again"
        laser.reduce(checkpoint, laser.make_plan(laser.scan(checkpoint), "rank:4"), out)
    for file in source.glob("*.j*"):
        assert (out / file.name).read_bytes() == file.read_bytes()
    before, after = (AutoTokenizer.from_pretrained(path) for path in (source, out))
    assert before.apply_chat_template(CONVERSATION, tokenize=False) == PUBLISHED
    assert after.apply_chat_template(CONVERSATION, tokenize=False) == PUBLISHED
    ids = [t.apply_chat_template(CONVERSATION, tokenize=True, return_dict=False) for t in (before, after)]
    assert ids[0] == ids[1] and ids[0].count(before.unk_token_id) == 0
    assert after.decode(ids[1]) == PUBLISHED


def load(path: Path, **arguments: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, local_files_only=True, **arguments).eval()


IDS = torch.arange(3, 35)[None]


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_loads_in_every_type_and_holds_what_is_stored(
    dtype: torch.dtype, attention: str, reduced: tuple[Path, Path]
) -> None:
    model = load(reduced[1], dtype=dtype, attn_implementation=attention)
    stored: dict[str, torch.Tensor] = {}
    for file in reduced[1].glob("*.safetensors"):
        stored |= load_file(file)
    q = model.get_parameter("model.layers.1.self_attn.q_proj.weight")
    assert torch.equal(q, stored["model.layers.1.self_attn.q_proj.weight"].to(dtype))
    down = model.get_parameter("model.layers.2.mlp.experts.down_proj")
    assert torch.equal(down[3], stored["model.layers.2.block_sparse_moe.experts.3.w2.weight"].to(dtype))
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
        exact = load(reduced[1], dtype=torch.float32, attn_implementation="eager")(input_ids=IDS).logits
    assert logits.dtype == dtype and torch.isfinite(logits).all()
    if dtype == torch.float32:  # in 16 bits a router may choose another expert
        assert torch.allclose(logits, exact, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs pip install bitsandbytes")
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")  # that it casts to float16, once a layer
@pytest.mark.parametrize(("bits", "layer"), [(8, "Linear8bitLt"), (4, "Linear4bit")])
def test_it_loads_in_few_bits(bits: int, layer: str, tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    # On the host, four bits come in blocks of 64 along a row.
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 64}
    config = LlamaConfig(num_attention_heads=2, num_key_value_heads=2, **sizes)
    LlamaForCausalLM(config).half().save_pretrained(tmp_path / "source")
    checkpoint = laser.open_checkpoint(tmp_path / "source")
    laser.reduce(checkpoint, laser.make_plan(laser.scan(checkpoint), "rank:4"), tmp_path / "reduced")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    few = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    model = load(tmp_path / "reduced", quantization_config=few, device_map=device)
    assert layer in {type(module).__name__ for module in model.modules()}
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=IDS.to(device)).logits).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, which is not here")
@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="needs flash_attn, which is not installed")
def test_it_loads_with_flash_attention(reduced: tuple[Path, Path]) -> None:
    model = load(reduced[1], dtype=torch.bfloat16, attn_implementation="flash_attention_2", device_map="cuda")
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=IDS.cuda()).logits).all()
