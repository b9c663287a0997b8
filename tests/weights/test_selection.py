from __future__ import annotations

from typing import Any

import pytest

from lightning_normreg._weights._names import check_globs, clean_name, match, select

NAMES = {
    "conv1.weight": (),
    "conv1.bias": (),
    "bn.weight": (),
    "embed.weight": ("head.weight", "copy.weight"),
    "head.bias": (),
}


@pytest.mark.pitfall(21)
@pytest.mark.parametrize(
    "name, clean",
    [
        ("conv.weight", "conv.weight"),
        ("_orig_mod.conv.weight", "conv.weight"),
        ("a._fsdp_wrapped_module.b._checkpoint_wrapped_module._orig_mod.weight", "a.b.weight"),
        ("_forward_module.0.weight", "0.weight"),
        ("conv._orig_mod", "conv"),
        ("_orig_mod", ""),
        ("", ""),
        ("my_orig_mod.weight", "my_orig_mod.weight"),
        ("_orig_mods.weight", "_orig_mods.weight"),
        ("module.weight", "module.weight"),
    ],
)
def test_clean_name(name: str, clean: str) -> None:
    """Whole segments that wrappers put in are left out, wherever they stand; nothing else is."""
    assert clean_name(name) == clean
    assert clean_name(clean) == clean


@pytest.mark.parametrize(
    "glob, found",
    [
        ("conv1.weight", ["conv1.weight"]),
        ("*.weight", ["conv1.weight", "bn.weight", "embed.weight"]),
        ("conv?.bias", ["conv1.bias"]),
        ("[bc]*.weight", ["conv1.weight", "bn.weight", "embed.weight"]),
        ("[!bc]*.bias", ["head.bias"]),
        ("*", list(NAMES)),
        ("head.*", ["embed.weight", "head.bias"]),
        ("copy.weight", ["embed.weight"]),
    ],
)
def test_match(glob: str, found: list[str]) -> None:
    """A glob finds names by themselves or by an alias, each once, in the order of the module."""
    assert match(glob, NAMES, "include") == found


@pytest.mark.parametrize("glob", ["CONV1.weight", "Bn.*", "conv1.weigh", "weight", "", "conv1"])
def test_match_is_of_the_whole_name_and_case_sensitive(glob: str) -> None:
    """Part of a name, or another case, is no match."""
    with pytest.raises(ValueError, match=r"`exclude` must match at least one parameter, but '.*' matches none\."):
        match(glob, NAMES, "exclude")


def test_near_misses() -> None:
    """A glob without a match names what comes near, the nearest first, at most three."""
    message = (
        r"^`include` must .* 'conv1\.weigh' matches none\. Near misses: 'conv1\.weight', '[a-z1.]+', '[a-z1.]+'\.$"
    )
    with pytest.raises(ValueError, match=message):
        match("conv1.weigh", NAMES, "include")


def test_nothing_near() -> None:
    """A glob that resembles nothing is answered by the first three names."""
    with pytest.raises(ValueError, match=r"Near misses: 'conv1\.weight', 'conv1\.bias', 'bn\.weight'\.$"):
        match("zzz", NAMES, "include")


def test_no_names() -> None:
    """Without parameters there is nothing to come near to."""
    with pytest.raises(ValueError, match=r"'\*' matches none\. The module has no parameters\."):
        match("*", {}, "include")


@pytest.mark.parametrize(
    "include, exclude, chosen",
    [
        (None, [], ["conv1.weight", "embed.weight"]),
        (None, ["embed.*"], ["conv1.weight"]),
        (None, ["head.weight"], ["conv1.weight"]),
        (None, ["bn.*"], ["conv1.weight", "embed.weight"]),
        (["head.*", "bn.weight"], [], ["bn.weight", "embed.weight", "head.bias"]),
        (["*"], ["*.weight", "conv1.*"], ["head.bias"]),
        (["*.weight"], [], ["conv1.weight", "bn.weight", "embed.weight"]),
        (["*.bias", "*.bias"], [], ["conv1.bias", "head.bias"]),
        (["*"], ["*"], []),
        ([], [], []),
    ],
)
def test_select(include: list[str] | None, exclude: list[str], chosen: list[str]) -> None:
    """`include` replaces the default, `exclude` takes away from both, and the module's order stays."""
    assert select(NAMES, include, exclude, default=["embed.weight", "conv1.weight"]) == chosen


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_select_without_a_match(argument: str) -> None:
    """Every glob of both lists has to match, and the error says in which it stands."""
    lists: dict[str, list[str]] = {"include": ["*"], "exclude": []}
    lists[argument] = ["*.weight", "conv2.*"]
    with pytest.raises(ValueError, match=rf"`{argument}` must match at least one parameter, but 'conv2\.\*'"):
        select(NAMES, **lists, default=[])


@pytest.mark.parametrize("globs", [[], ["*.weight"], ("a", "b")])
def test_lists_of_globs(globs: Any) -> None:
    """Lists and tuples of strings pass."""
    check_globs("include", globs)


@pytest.mark.parametrize("globs", ["*.weight", "", b"*", [b"*"], [1], ["a", None], {"a"}, {"a": 1}, None, 3])
def test_no_list_of_globs(globs: Any) -> None:
    """A plain string, which would be read letter by letter, and anything else that is no list is refused."""
    with pytest.raises(
        TypeError, match=r"`include` must be a list of globs, got .*\. Use for example \['\*\.weight'\]"
    ):
        check_globs("include", globs)
