"""Every kind of fault in the shared cases has its test here, made of this suite's own inputs."""

from __future__ import annotations

import ast
from pathlib import Path

HERE = Path(__file__).parent
TESTS = {
    "other_weights": "test_faults_at_rest.py test_records_of_a_fine_tune_are_refused_with_both_names",
    "resume_trusts_bytes": "test_faults_at_rest.py test_every_fault_in_an_unfinished_output_is_repaired_or_named",
    "stale_partial_in_source": "checkpoint/test_writer.py test_weights_in_other_formats_are_left_out_and_named",
    "force_deletes": "test_faults_at_rest.py test_force_leaves_the_old_output_until_the_new_one_is_whole",
    "two_processes": "test_two_processes.py test_of_many_at_once_exactly_one_wins",
    "symlink_leak": "checkpoint/test_regular.py test_a_link_carries_nothing_into_an_output",
    "fifo": "checkpoint/test_regular.py test_a_checkpoint_of_strange_files_is_refused_at_once",
    "headers": "checkpoint/test_regular.py test_what_laser_takes_of_mutated_headers_safetensors_takes",
    "wrong_advice": "test_advice.py test_options_in_messages_are_there",
    "unfrozen_yaml": "test_null.py test_unfrozen_list_matches_what_it_names_and_nothing_else",
}


def names_in(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def test_every_shared_case_has_its_test(shared: Path) -> None:
    assert names_in(shared / "cases" / "faults.py") >= TESTS.keys()
    tree = ast.parse((shared / "cases" / "faults.py").read_text())
    cases = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.decorator_list}
    assert cases == TESTS.keys()
    for told in TESTS.values():
        file, name = told.split()
        assert name in names_in(HERE / file), told
