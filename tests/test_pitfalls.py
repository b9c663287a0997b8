r"""What goes wrong around optimizer steps, sharded weights and checkpoints; each has a test that guards against it.

``grep -rnA9 "pitfall(.*\b7\b" tests`` finds those of number 7.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PITFALLS = {
    1: "The pre-hook of a step runs before the closure's forward pass, when gradients are missing or of another batch.",
    2: "A subclass whose step() calls super().step() fires its hooks twice.",
    3: "A step may update nothing: fused optimizers skip inside their kernel, and training_step may return None.",
    4: "load_state_dict puts new group dictionaries into an optimizer: those that were kept show old learning rates.",
    5: "The optimizers of a running Trainer are replaced, and the hooks stay with the old ones.",
    6: "After an exception there is no teardown: hooks would stay on an optimizer that the user still has.",
    7: "LBFGS evaluates its closure several times in a step, with gradients at other weights each time.",
    8: "global_step counts every optimizer: the curves of a GAN would have two x for one batch.",
    9: "Under accumulation a batch may be logged that made no step, or a step twice.",
    10: "Weights are changed after the step: averaged over ranks, by a wrapper, or as partitions by DeepSpeed.",
    11: "item(), float() and to_local() of a norm of a DTensor give that of the local shard.",
    12: "Lists in which some weights are DTensors and others are not cannot be given to one foreach function.",
    13: "After a validation FSDP2 shows unsharded copies of the root's weights under their names.",
    14: "The shards of FSDP1 are flat, cut in the middle of a row, maybe empty, and then without a gradient.",
    15: "What only some ranks do, such as logging, leaves the others waiting in a collective.",
    16: "TensorBoard reads tags of a layout as regular expressions, and a second layout in a run replaces the first.",
    17: "--optimizer replaces configure_optimizers, and with it the decay groups of the mixin.",
    18: "Checkpoints are loaded with weights_only=True, which refuses all but plain types in the state of callbacks.",
    19: "Projecting what has just been loaded rounds it once more: the resumed run is another one.",
    20: "Averages of weights on a sphere lie inside of it.",
    21: "torch.compile, FSDP1 and activation checkpointing put prefixes into the names of parameters.",
    22: "The Callback classes of pytorch_lightning and lightning.pytorch are not the same, and one may not be there.",
    23: "Norms of float32 on the CPU lose digits with their length: 6e-4 of 16 million entries.",
    24: "Rows of zeros have no direction, and foreach functions refuse empty lists.",
    25: "Lightning replaces attributes of callbacks that are called log and log_dict.",
    26: "Under ddp_spawn and ddp_fork the callback of the main process has seen nothing of the fit.",
    27: "The learning-rate finder and the batch-size finder take all other callbacks away.",
    28: "Distributed training shuffles, also without being asked to: a comparison would be of other batches.",
    29: "A command line keeps arguments of a default optimizer for another one: SGD with the decay of AdamW.",
}


def marked(source: str) -> set[int]:
    """Numbers that tests in a file are marked with."""
    found: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.pitfall":
                    found |= {ast.literal_eval(number) for number in mark.args}
    return found


@pytest.fixture(scope="module")
def guarded() -> set[int]:
    """Numbers in all files of tests."""
    return set().union(*(marked(path.read_text()) for path in Path(__file__).parent.rglob("test_*.py")))


@pytest.mark.parametrize("number", PITFALLS)
def test_each_has_a_test(number: int, guarded: set[int]) -> None:
    """At least one is marked with its number."""
    assert number in guarded, PITFALLS[number]


def test_marks_are_of_the_list(guarded: set[int]) -> None:
    """A number that is not in it would guard against nothing."""
    assert guarded <= PITFALLS.keys()


def test_the_check_can_fail() -> None:
    """Marks of helpers, other marks and commented ones do not count."""
    source = """
@pytest.mark.pitfall(1, 2)
@pytest.mark.slow
def test_a(): ...
@pytest.mark.pitfall(3)
def helper(): ...
# @pytest.mark.pitfall(4)
@pytest.mark.parametrize("x", [5])
def test_b(): ...
"""
    assert marked(source) == {1, 2}
