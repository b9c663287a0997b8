"""From the saved state of an optimizer to its class, and to the names of its parameters: right, or left open."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from lightning_normreg._reports import SavedGroup, match_parameters, saved_groups
from lightning_normreg._reports._checkpoint import CheckpointError

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {},
    "SGD momentum": {"momentum": 0.9},
    "Adam": {},
    "AdamW": {},
    "AdamW amsgrad": {"amsgrad": True},
    "NAdam": {},
    "RAdam": {},
    "Adamax": {},
    "RMSprop": {},
    "RMSprop centered": {"centered": True, "momentum": 0.5},
    "Adagrad": {},
    "Adadelta": {},
    "ASGD": {},
    "Rprop": {},
    "Adafactor": {},
    "Muon": {},
    "LBFGS": {},
}


def stepped(name: str, parameters: Any, **options: Any) -> torch.optim.Optimizer:
    """One of torch's optimizers after a step."""
    if not hasattr(torch.optim, name):
        pytest.skip(f"this torch has no {name}")
    optimizer: torch.optim.Optimizer = getattr(torch.optim, name)(parameters, lr=1e-3, **options)

    def loss() -> torch.Tensor:
        total = sum((p**2).sum() for group in optimizer.param_groups for p in group["params"] if p.requires_grad)
        total.backward()  # type: ignore[union-attr]
        return total  # type: ignore[return-value]

    optimizer.step(loss)  # type: ignore[arg-type]
    return optimizer


@pytest.mark.parametrize("key", list(OPTIMIZERS))
def test_classes_of_torch_are_recognized(key: str) -> None:
    """Each by its own settings and state, and no other claims them; what is assumed is said."""
    name = key.split(maxsplit=1)[0]
    state = stepped(name, [nn.Parameter(torch.randn(4, 3))], **OPTIMIZERS[key]).state_dict()
    (group,), (said,) = saved_groups([state])
    assert group.optimizer == name
    assert said.startswith(f"Assumed: the optimizer is torch.optim.{name}")


def test_adam_and_adamw_of_older_versions() -> None:
    """Their groups are the same, so both are candidates, unless the user says which."""
    state = stepped("AdamW", [nn.Parameter(torch.randn(4, 3))]).state_dict()
    del state["param_groups"][0]["decoupled_weight_decay"]
    (group,), (said,) = saved_groups([state])
    assert group.optimizer == "Adam or AdamW"
    assert "is left blank" in said
    for name, decay in (("Adam", "coupled"), ("AdamW", "decoupled")):
        (group,), _ = saved_groups([state], [name])
        assert [rule.decay for rule in group.rules] == [decay]  # type: ignore[union-attr]


@pytest.mark.parametrize("extra", [{"caution": False}, {"use_muon": True}])
def test_strangers_are_not_recognized(extra: dict[str, Any]) -> None:
    """Settings that torch's do not have; a copy of SGD from before torch's groups had `foreach`; other state."""
    state = stepped("SGD", [nn.Parameter(torch.randn(4, 3))], momentum=0.9).state_dict()
    state["param_groups"][0] |= extra
    old = stepped("SGD", [nn.Parameter(torch.randn(4, 3))], momentum=0.9).state_dict()
    del old["param_groups"][0]["foreach"]
    other = stepped("SGD", [nn.Parameter(torch.randn(4, 3))], momentum=0.9).state_dict()
    other["state"][0]["trust"] = torch.ones(4, 3)
    groups, said = saved_groups([state, old, other])
    assert [(group.optimizer, group.rules) for group in groups] == [("", ())] * 3
    assert all("is not known" in words for words in said)


@pytest.mark.parametrize(
    "name, made, message",
    [
        ("Adam", "SGD", r"cannot be Adam: its groups have no amsgrad, betas, eps"),
        ("AdamW", "Adam", r"cannot be AdamW: its decay is not decoupled"),
        ("Adamax", "Adam", r"cannot be Adamax: it keeps exp_avg_sq"),
        ("Nonsense", "SGD", r"no rule is known for 'Nonsense'.*package\.Class"),
        ("os.system", "SGD", r"no rule is known for 'os.system'"),
    ],
)
def test_a_wrong_class_is_refused(name: str, made: str, message: str) -> None:
    """What the user says must go with the state."""
    state = stepped(made, [nn.Parameter(torch.randn(4, 3))]).state_dict()
    with pytest.raises(CheckpointError, match=message):
        saved_groups([state], [name])


def test_one_class_for_each_optimizer() -> None:
    """Two optimizers and three classes."""
    state = stepped("SGD", [nn.Parameter(torch.randn(4, 3))]).state_dict()
    with pytest.raises(CheckpointError, match=r"has 2 optimizers, got 3 classes"):
        saved_groups([state, state], ["SGD"] * 3)


def owners(module: nn.Module, *optimizers: torch.optim.Optimizer) -> tuple[dict[str, str], list[str]]:
    """Name → label of its group, from the states alone; and what is said."""
    state = module.state_dict()
    tensors = {n: t for n, t in state.items() if t.is_floating_point() and "running" not in n}
    first = {id(p): n for n, p in module.named_parameters()}
    aliases: dict[str, tuple[str, ...]] = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        if first[id(p)] != name:
            aliases[first[id(p)]] = (*aliases.get(first[id(p)], ()), name)
            del tensors[name]
    groups, _ = saved_groups([optimizer.state_dict() for optimizer in optimizers])
    found, said = match_parameters(groups, tensors, aliases)
    return {name: group.label for name, group in found.items()}, said


class Net(nn.Module):
    """Two layers with BatchNorm, a head, and a weight that is tied to the first embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 5)
        self.first = nn.Linear(5, 6)
        self.norm = nn.BatchNorm1d(6)
        self.second = nn.Linear(6, 6)
        self.out = nn.Linear(5, 7, bias=False)
        self.out.weight = self.table.weight


def test_one_group_of_all_parameters() -> None:
    """Tied ones once, frozen ones without state, BatchNorm's buffers in between: all are found."""
    net = Net()
    net.first.weight.requires_grad_(False)
    found, said = owners(net, stepped("AdamW", net.parameters()))
    assert found == {name: "0" for name, _ in net.named_parameters()}
    assert "by the module's order and the shapes of their state" in said[0]


def test_decay_and_no_decay() -> None:
    """The split of many scripts, weights here and all else there, which exhausts the module."""
    net = Net()
    split = [[p for p in net.parameters() if p.ndim > 1], [p for p in net.parameters() if p.ndim < 2]]
    found, _ = owners(net, stepped("SGD", [{"params": s} for s in split], momentum=0.9))
    assert found == {name: str(int(p.ndim < 2)) for name, p in net.named_parameters()}


def test_frozen_parameters_that_were_left_out() -> None:
    """Of the four vectors of six entries three are trained: which is open. The matrices are certain."""
    net = Net()
    trained = [p for n, p in net.named_parameters() if n != "norm.weight"]
    found, said = owners(net, stepped("AdamW", trained))
    assert found == dict.fromkeys(["table.weight", "first.weight", "second.weight", "second.bias"], "0")
    assert "2 of the 6 parameters of group 0 could be several" in said[1]


def test_named_groups() -> None:
    """By name whatever the order, also where a submodule's names were given."""
    net = Net()
    shuffled = list(net.named_parameters())[::-1]
    found, said = owners(net, stepped("SGD", [{"params": shuffled[:2]}, {"params": shuffled[2:]}]))
    assert found == {name: str(int(i >= 2)) for i, (name, _) in enumerate(shuffled)}
    assert said == []
    outer = nn.ModuleDict({"net": net, "other": nn.Linear(3, 3)})
    found, said = owners(outer, stepped("AdamW", net.named_parameters()))
    assert found == {f"net.{name}": "0" for name, _ in net.named_parameters()}


def test_sharded_runs_number_by_name() -> None:
    """Their state has the names of the parameters where others have numbers."""
    net = Net()
    state = stepped("AdamW", net.parameters()).state_dict()
    names = [name for name, _ in net.named_parameters()]
    state["state"] = {names[index]: entry for index, entry in state["state"].items()}
    state["param_groups"][0]["params"] = names[::-1]
    groups, _ = saved_groups([state])
    found, said = match_parameters(groups, {n: p.data for n, p in net.named_parameters()}, {})
    assert (sorted(found), said) == (sorted(names), [])


def test_names_that_the_weights_do_not_have() -> None:
    """A renamed layer, and one of another shape, are said and left out."""
    net = Net()
    groups, _ = saved_groups([stepped("AdamW", net.named_parameters()).state_dict()])
    tensors = {n: t for n, t in net.state_dict().items() if "running" not in n and t.ndim}
    tensors["first.weight"] = torch.zeros(6, 9)
    tensors["last.bias"] = tensors.pop("second.bias")
    found, (said,) = match_parameters(groups, tensors, {"table.weight": ("out.weight",)})
    assert sorted(found) == ["first.bias", "norm.bias", "norm.weight", "second.weight", "table.weight"]
    assert "'second.bias', 'first.weight'" in said


def test_two_optimizers_of_equal_halves() -> None:
    """Generator and discriminator of one shape could be swapped, so nothing is said of them; of two shapes they not."""
    halves = nn.ModuleDict({"one": nn.Linear(4, 4), "two": nn.Linear(4, 4)})
    found, said = owners(halves, *(stepped("Adam", half.parameters()) for half in halves.values()))
    assert found == {}
    assert len([words for words in said if "could be several" in words]) == 2
    halves = nn.ModuleDict({"one": nn.Linear(4, 4), "two": nn.Linear(4, 5)})
    swapped = [stepped("Adam", halves[name].parameters()) for name in ("two", "one")]
    found, _ = owners(halves, *swapped)
    assert found == {"one.weight": "1:0", "one.bias": "1:0", "two.weight": "0:0", "two.bias": "0:0"}


def test_without_state_there_is_only_the_order() -> None:
    """Plain SGD: all of them or nothing."""
    net = Net()
    found, said = owners(net, stepped("SGD", net.parameters()))
    assert set(found) == {name for name, _ in net.named_parameters()}
    assert "alone, since they have no state" in said[0]
    found, said = owners(net, stepped("SGD", net.second.parameters()))
    assert found == {}


def test_another_order_is_no_order() -> None:
    """A group that does not fit is said, and nothing is guessed."""
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 5))
    found, said = owners(net, stepped("AdamW", list(net.parameters())[::-1]))
    assert found == {}
    assert "does not fit the weights in the module's order" in said[1]


def embeddings(shapes: Sequence[Any], places: Sequence[Any], taken: frozenset[int], start: int = 0) -> Iterator[tuple]:
    """All ways to lay a list of shapes over places in order, by trying."""
    if not shapes:
        yield ()
        return
    for at in range(start, len(places)):
        if at not in taken and shapes[0] in (None, places[at]):
            for rest in embeddings(shapes[1:], places, taken, at + 1):
                yield (at, *rest)


def joint(groups: Sequence[Sequence[Any]], places: Sequence[Any], taken: frozenset[int] = frozenset()) -> Iterator:
    """All ways to lay several, none over another."""
    if not groups:
        yield ()
        return
    for first in embeddings(groups[0], places, taken):
        for rest in joint(groups[1:], places, taken | set(first)):
            yield (first, *rest)


@pytest.mark.parametrize("seed", range(60))
def test_nothing_certain_is_wrong(seed: int) -> None:
    """Against trying all ways, on random modules: an owner is one only if every way has it; alone, exactly then."""
    draw = random.Random(seed)
    places = [(draw.choice([2, 3]),) for _ in range(draw.randint(2, 7))]
    tensors = {f"p{i}": torch.zeros(shape) for i, shape in enumerate(places)}
    count = draw.randint(1, 3)
    owner = [draw.choice([*range(count), None]) for _ in places]
    hidden = [None if draw.random() < 0.25 else shape for shape in places]
    shapes = [[hidden[i] for i, o in enumerate(owner) if o == g] for g in range(count)]
    groups = [SavedGroup(str(g), {}, (), params=tuple(s), shapes=tuple(s)) for g, s in enumerate(shapes)]
    found, _ = match_parameters(groups, tensors, {})
    ways = list(joint(shapes, places))
    sure = {
        f"p{i}": str(g)
        for i in range(len(places))
        for g in range(count)
        if all(i in way[g] for way in ways) and any(len({way[g][k] for way in ways}) == 1 and ways[0][g][k] == i
                                                     for k in range(len(shapes[g])))
    }  # fmt: skip
    assert {name: group.label for name, group in found.items()}.items() <= sure.items()
    assert all(owner[int(name[1:])] == int(group.label) for name, group in found.items())
    if count == 1:
        assert {name: group.label for name, group in found.items()} == sure
