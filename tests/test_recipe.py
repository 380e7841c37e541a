"""Recipes: matching, TOML, and messages that name what is wrong."""

from __future__ import annotations

import pytest

from lnsdeploy.errors import BadFileError, BadTypeError, BadValueError, UnknownNameError
from lnsdeploy.formats import LNSFormat
from lnsdeploy.recipe import LayerRecipe, Match, Recipe, load_recipe

NARROW = LayerRecipe(LNSFormat(4, 2), LNSFormat(6, 4), "tensor", "lsq", "lns-madam-8")
RECIPE = Recipe(LayerRecipe(), (("block.*", NARROW), ("*.conv2", LayerRecipe(None, None))))


def test_last_match_wins() -> None:
    assert RECIPE.for_layer("conv1") == LayerRecipe()
    assert RECIPE.for_layer("block.conv1") == NARROW
    assert RECIPE.for_layer("block.conv2").is_float


def test_patterns_are_case_sensitive_and_match_the_whole_name() -> None:
    recipe = Recipe(layers=(("Conv*", NARROW), ("lock.conv1", NARROW)))
    assert recipe.for_layer("conv1") == LayerRecipe()
    assert recipe.for_layer("block.conv1") == LayerRecipe()


@pytest.mark.smoke
def test_toml_round_trip() -> None:
    assert Recipe.from_toml(RECIPE.to_toml()) == RECIPE
    assert Recipe.from_toml(Recipe().to_toml()) == Recipe()
    assert 'weight = "float"' in RECIPE.to_toml()


def test_left_out_fields_are_the_defaults() -> None:
    text = '[default]\nweight = "u6:4"\n[[layer]]\npattern = "head"\nactivation = "float"\n'
    recipe = Recipe.from_toml(text, base=LayerRecipe(LNSFormat(3, 1), LNSFormat(3, 1), "tensor"))
    assert recipe.default == LayerRecipe(LNSFormat(6, 4, signed=False), LNSFormat(3, 1), "tensor")
    assert recipe.for_layer("head") == LayerRecipe(LNSFormat(6, 4, signed=False), None, "tensor")


def test_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "recipe.toml"
    file.write_text(RECIPE.to_toml(), encoding="utf-8")
    assert load_recipe(file) == RECIPE
    file.write_text("[default\n", encoding="utf-8")
    with pytest.raises(BadFileError, match=r"recipe\.toml: not valid TOML"):
        load_recipe(file)
    with pytest.raises(BadFileError, match="cannot read"):
        load_recipe(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[defualt]\n", "unknown field 'defualt'; did you mean 'default'"),
        ('[default]\nweights = "8:8"\n', "default: unknown field 'weights'; did you mean 'weight'"),
        ('[default]\nweight = "99:2"\n', "default.weight: bits must be from 2 to 32, not 99"),
        ("[default]\nactivation = 8\n", 'default.activation: not an LNS format: 8 .* or write "float"'),
        ('[default]\ngranularity = "chanel"\n', "granularity 'chanel'; did you mean 'channel'"),
        ('[default]\ncalibration = "max"\n', "default.calibration: unknown calibration 'max'"),
        ("[default]\ndatapath = 3\n", "default.datapath: must be text, not 3"),
        ('[default]\ndatapath = ""\n', "default.datapath: must be a name or a file"),
        ("default = 3\n", "default must be a table"),
        ('[layer]\npattern = "a"\n', r"layer must be a list of tables \(\[\[layer\]\]\)"),
        ('[[layer]]\nweight = "8:8"\n', "layer 1.pattern must be a layer's name or pattern, not None"),
        ("layer = [3]\n", "layer 1 must be a table, not 3"),
        ('[default]\noutput = "float"\n', "default.output: results are words"),
        ('[default]\nerror = "8"\n', 'default.error: not an LNS format: .* or write "float"'),
        ('[default]\noffsets = "static"\n', "default.offsets: unknown offsets 'static'"),
        ('[[layer]]\nposition = "middle"\n', "layer 1: unknown position 'middle'"),
        ("[[layer]]\ntype = 3\n", "layer 1.type: must be text|layer 1.must be text, not 3"),
    ],
)
def test_errors_name_the_field(text: str, message: str) -> None:
    with pytest.raises(BadFileError, match=message):
        Recipe.from_toml(text, where="r.toml")


def test_all_errors_are_named_at_once() -> None:
    text = '[default]\nweight = "1:1"\ncalibration = "max"\n[[layer]]\nbits = 3\npattern = "a"\n'
    with pytest.raises(BadFileError) as caught:
        Recipe.from_toml(text, where="r.toml")
    assert str(caught.value).startswith("r.toml: ")
    for part in ("default.weight", "default.calibration", "layer 1: unknown field 'bits'"):
        assert part in str(caught.value)


def test_construction_is_checked() -> None:
    with pytest.raises(BadTypeError, match="weight must be an LNSFormat or None"):
        LayerRecipe(weight="8:8")  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="granularity"):
        LayerRecipe(granularity="row")  # type: ignore[arg-type]
    with pytest.raises(BadValueError, match="datapath"):
        LayerRecipe(datapath="")
    with pytest.raises(BadTypeError, match="pairs of a pattern and a LayerRecipe"):
        Recipe(layers=(("a", "8:8"),))  # type: ignore[arg-type]
    with pytest.raises(BadTypeError, match="default must be a LayerRecipe"):
        Recipe("8:8")  # type: ignore[arg-type]


def test_patterns_that_match_nothing_are_refused() -> None:
    recipe = Recipe(layers=(("hiden1", NARROW),))
    with pytest.raises(UnknownNameError, match="'hiden1'; did you mean 'hidden1'"):
        recipe.check_patterns(["hidden1", "output"])
    recipe.check_patterns(["hiden1"])


def test_uniform() -> None:
    assert Recipe.uniform(4, 2, granularity="tensor").default == LayerRecipe(LNSFormat(4, 2), LNSFormat(4, 2), "tensor")


FULL = """
[default]
weight = "8:8"
activation = "8:8"
granularity = "channel"
calibration = "absmax"
output = "12:8"
error = "6:8"
gradient = "float"
offsets = "recorded"

[[layer]]
type = "matmul"
weight = "16:1024"
activation = "16:1024"
granularity = "channel"
calibration = "absmax"
output = "12:8"
error = "6:8"
gradient = "float"
offsets = "recorded"

[[layer]]
pattern = "blocks.*"
type = "Conv2d"
position = "first"
weight = "float"
activation = "float"
granularity = "channel"
calibration = "absmax"
output = "12:8"
error = "float"
gradient = "8:8"
"""


def test_every_field_goes_through_toml() -> None:
    recipe = Recipe.from_toml(FULL)
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    assert recipe.default.output == LNSFormat(12, 8)
    assert recipe.default.gradient == "float"
    assert recipe.layers[0][0] == Match(type="matmul")
    assert recipe.layers[1][0] == Match("blocks.*", "Conv2d", "first")
    assert recipe.layers[1][1].error == "float"
    assert recipe.layers[1][1].offsets == "recorded"


def test_rules_hold_for_what_has_all_they_name() -> None:
    recipe = Recipe.from_toml(FULL)
    assert recipe.for_layer("attn", ("matmul", "Attention")) == recipe.layers[0][1]
    assert recipe.for_layer("attn", ("linear", "Linear")) == recipe.default
    assert recipe.for_layer("blocks.0", ("conv", "Conv2d"), ("first",)) == recipe.layers[1][1]
    assert recipe.for_layer("blocks.0", ("conv", "Conv2d"), ("last",)) == recipe.default
    assert recipe.for_layer("stem", ("conv", "Conv2d"), ("first",)) == recipe.default
    # any of several names
    assert recipe.for_layer(("stem", "blocks.0"), ("Conv2d",), ("first",)) == recipe.layers[1][1]


def test_positions() -> None:
    assert Recipe.positions("a", ["a", "b", "c"]) == ("first",)
    assert Recipe.positions("c", ["a", "b", "c"]) == ("last",)
    assert Recipe.positions("a", ["a"]) == ("first", "last")
    assert Recipe.positions("b", ["a", "b", "c"]) == Recipe.positions("a", []) == ()


def test_a_match_that_is_only_a_pattern_is_that_pattern() -> None:
    assert Recipe(layers=((Match("a.*"), NARROW),)) == Recipe(layers=(("a.*", NARROW),))
    with pytest.raises(UnknownNameError, match="position"):
        Match(position="middle")  # type: ignore[arg-type]
    with pytest.raises(BadTypeError, match='error must be an LNSFormat, "float" or None'):
        LayerRecipe(error="8:8")  # type: ignore[arg-type]


def test_rules_for_products_alone_need_no_layer() -> None:
    recipe = Recipe(layers=((Match("encoder.*", "matmul"), NARROW), (Match(type="conv"), NARROW)))
    recipe.check_patterns(["fc"])
    with pytest.raises(UnknownNameError, match="no layer matches"):
        Recipe(layers=((Match("encoder.*", "linear"), NARROW),)).check_patterns(["fc"])
