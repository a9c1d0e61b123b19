"Registries: a specification builds the thing that it names, or the error says what is known."

from dataclasses import FrozenInstanceError

import pytest

from optgen.registry import Registry, parse_spec, read_json


def power(base: float, exponent: float = 2.0) -> float:
    "Return base to the exponent."
    if base < 0:
        raise ValueError("base must not be negative")
    return base**exponent


def nothing() -> str:
    "Return a thing that takes no arguments."
    return "nothing"


@pytest.fixture
def powers():
    "A registry of three entries."
    registry = Registry("power")
    registry.add("square", power, "the second power")
    registry.add("cube", power, "the third power", exponent=3)
    registry.add("nothing", nothing, "no power")
    return registry


def test_specifications_are_split():
    assert parse_spec("a") == parse_spec("a:") == ("a", {})
    found = parse_spec("a:x=1,y=true,z=0.5")
    assert found == ("a", {"x": 1, "y": True, "z": 0.5})
    assert parse_spec("a:x=b=c", read=str.upper) == ("a", {"x": "B=C"})
    for text in ("a:x", "a:x=", "a:x=1,y"):
        with pytest.raises(ValueError, match="has no value, as in a:KEY=VALUE"):
            parse_spec(text)


def test_words_are_read_as_json():
    assert [read_json(word) for word in ("3", "-1e-3", "true", "false")] == [3, -1e-3, True, False]
    with pytest.raises(ValueError, match="'adam' is neither a number, true nor false") as error:
        read_json("adam")
    assert error.value.__suppress_context__
    assert read_json("null") is None


# Beyond float32, or not finite; and JSON that is no number.
NOT_NUMBERS = ("NaN", "nan", "Infinity", "-inf", "1e999", "-1e39", "1e-46", "1" * 40, "9" * 5000)
NOT_WORDS = ("[1]", "{}", '"x"', "True", "1e", "--1", "[" * 5000)


@pytest.mark.parametrize("word", NOT_NUMBERS, ids=lambda word: word[:12])
def test_a_number_beyond_single_precision_is_refused_by_name(word):
    with pytest.raises(ValueError, match="square: base must be a finite number in the range of"):
        parse_spec(f"square:base={word}")


@pytest.mark.parametrize("word", NOT_WORDS, ids=lambda word: word[:12])
def test_a_word_that_spells_no_number_is_refused(word):
    with pytest.raises(ValueError, match="neither a number, true nor false"):
        parse_spec(f"square:base={word}")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("square:base=3", 9),
        ("cube:base=2", 8),
        ("cube:base=2,exponent=4", 16),
        ("nothing", "nothing"),
    ],
)
def test_what_is_given_replaces_the_defaults(powers, text, expected):
    assert powers.build(text) == expected


def test_a_reader_of_words_is_used(powers):
    assert powers.build("square:base=five", read={"five": 5}.__getitem__) == 25


def test_entries_are_found_by_name(powers):
    assert powers.find("cube").defaults == {"exponent": 3} and powers.find("cube").make is power
    assert powers.find("square").defaults == {} and list(powers) == ["square", "cube", "nothing"]
    assert powers.summaries()["cube"] == "the third power"


@pytest.mark.parametrize(
    "text, message",
    [
        ("root", "no power 'root'; there are: square, cube, nothing"),
        ("square", "square needs base, as in square:base=..."),
        ("square:b=3", "square takes no argument 'b'; its arguments are: base, exponent"),
        ("nothing:b=3", "nothing takes no argument 'b'; its arguments are: none"),
        ("square:base=-1", "square cannot be built with base=-1: base must not be negative"),
        ("cube:base=-1", "cube cannot be built with base=-1: base must not be negative"),
        ("square:base=true,exponent=null", "cannot be built with base=True, exponent=None"),
    ],
)
def test_a_wrong_specification_is_one_clear_error(powers, text, message):
    with pytest.raises(ValueError) as error:
        powers.build(text)
    assert message in str(error.value) and error.value.__cause__ is None


def test_an_entry_without_arguments_that_fails(powers):
    def broken():
        "Raise an error."
        raise TypeError("broken")

    powers.add("broken", broken, "fails")
    with pytest.raises(ValueError, match="broken cannot be built with no arguments: broken"):
        powers.build("broken")


def test_a_default_can_give_a_required_argument(powers):
    powers.add("eight", power, "two to the third", base=2, exponent=3)
    assert powers.build("eight") == 8


def test_entries_do_not_change(powers):
    with pytest.raises(FrozenInstanceError):
        powers.find("cube").summary = "another"


def test_a_name_is_registered_once(powers):
    with pytest.raises(ValueError, match="the power 'cube' is already registered"):
        powers.add("cube", power, "again")
    assert powers.find("cube").summary == "the third power"


def with_options(lr=1.0, **options):
    """Return what was given."""
    return lr, options


def test_variadic_arguments_are_not_required_and_take_any_name():
    registry = Registry("thing")
    registry.add("thing", with_options, "takes any option", lr=2.0)
    assert registry.build("thing") == (2.0, {})
    assert registry.build("thing:lr=3,speed=1") == (3, {"speed": 1})
