"""A1111's prompt language. What is stored here is what its modules/prompt_parser.py gives, its own examples first."""

import pytest

from sdlora.generation.prompts.syntax import BREAK, Part, Piece, negative_of, parts_of, pieces_of, schedule_of

IN_TURN = ((end, "a" if end % 2 else "(b:1.1)") for end in range(1, 11))


@pytest.mark.parametrize(
    ("prompt", "schedule"),
    [
        ("test", [(10, "test")]),
        ("", [(10, "")]),
        ("a [b:3]", [(3, "a "), (10, "a b")]),
        ("a [b: 3]", [(3, "a "), (10, "a b")]),
        ("a [[[b]]:2]", [(2, "a "), (10, "a [[b]]")]),
        ("[(a:2):3]", [(3, ""), (10, "(a:2)")]),
        ("a [b : c : 1] d", [(1, "a b  d"), (10, "a  c  d")]),
        ("a[b:[c:d:2]:1]e", [(1, "abe"), (2, "ace"), (10, "ade")]),
        ("a [unbalanced", [(10, "a [unbalanced")]),
        ("a [b:.5] c", [(5, "a  c"), (10, "a b c")]),
        ("((a][:b:c [d:3]", [(3, "((a][:b:c "), (10, "((a][:b:c d")]),
        ("[a|(b:1.1)]", list(IN_TURN)),
        ("[fe|]male", [(end, "female" if end % 2 else "male") for end in range(1, 11)]),
        ("[fe|||]male", [(end, "female" if end % 4 == 1 else "male") for end in range(1, 11)]),
        # Read off the same grammar, with lark 1.3.1.
        ("a [b::0.3] c", [(3, "a b c"), (10, "a  c")]),
        ("[a:b:1.0]", [(10, "a")]),
        ("[a:b:0.04]", [(10, "b")]),
        ("[a:b:0]", [(10, "b")]),
        ("[a:b:-2]", [(10, "b")]),
        ("[a:b:12]", [(10, "a")]),
        ("[a:b:1e0]", [(1, "a"), (10, "b")]),
        ("[a:b:.25 ]", [(2, "a"), (10, "b")]),
        ("[::3]", [(3, ""), (10, "")]),
        ("[a:b]", [(10, "[a:b]")]),
        ("[a:b:c:3]", [(10, "[a:b:c:3]")]),
        ("[a:b:3x]", [(10, "[a:b:3x]")]),
        (r"[a\:b:3]", [(3, ""), (10, r"a\:b")]),
        (r"[a:b:3\]", [(10, r"[a:b:3\]")]),
        ("(a:b:c) [d:3]", [(3, "(a:b:c) "), (10, "(a:b:c) d")]),
        ("([a:b:c] [d:3])", [(3, "([a:b:c] )"), (10, "([a:b:c] d)")]),
        ("[(a] b) [c:3]", [(3, "[(a] b) "), (10, "[(a] b) c")]),
        ("a | b [c:3]", [(10, "a | b [c:3]")]),
        ("[a|b:3] [c:3]", [(10, "[a|b:3] [c:3]")]),
        ("(a|b) [c:3]", [(10, "(a|b) [c:3]")]),
        ("[c:3] \\", [(10, "[c:3] \\")]),
        ("[[a|b]:c:2]", [(1, "a"), (2, "b"), *((end, "c") for end in range(3, 11))]),
        ("[a|[b:c:2]]", [(end, "a" if end % 2 else "b" if end == 2 else "c") for end in range(1, 11)]),
    ],
)
def test_editing_and_alternation_are_those_of_a1111(prompt: str, schedule: list[tuple[int, str]]):
    assert schedule_of(prompt, 10) == tuple(schedule)


def test_a_text_counts_one_step_longer_than_it_is_written_for_as_in_a1111():
    """Its sampler counts steps from 0 and asks for the first text whose step, written from 1, is not below."""
    (part,) = parts_of("a [b:c:0.5]", 10)
    assert part.spans == ((0, "a b"), (6, "a c"))
    assert [part.text_at(step)[-1] for step in range(10)] == list("bbbbbbcccc")
    (part,) = parts_of("[a|b|c]", 7)
    assert [part.text_at(step) for step in range(7)] == list("aabcabc")
    assert parts_of("[a:b:0]", 10)[0].spans == ((0, "b"),)
    assert parts_of("[a:b:9]", 10)[0].spans == ((0, "a"),)


@pytest.mark.parametrize(
    ("prompt", "weighted"),
    [
        ("a cat", [("a cat", 1.0)]),
        ("a AND b", [("a", 1.0), (" b", 1.0)]),
        ("a :1.2 AND b: -.5 ANDb AND", [("a", 1.2), (" b: -.5 ANDb", 1.0), ("", 1.0)]),
        ("a AND b : -.5 \n", [("a", 1.0), (" b", -0.5)]),
        ("one\ntwo:2. AND (c:1.3)", [("one\ntwo", 2.0), (" (c:1.3)", 1.0)]),
        ("alone:0.7", [("alone", 0.7)]),
        ("a:1:2", [("a:1", 2.0)]),
        ("a:1e3", [("a:1e3", 1.0)]),
        ("band and GRAND", [("band and GRAND", 1.0)]),
        ("a:" + "9" * 400, [("a:" + "9" * 400, 1.0)]),
    ],
)
def test_parts_and_their_weights(prompt: str, weighted: list[tuple[str, float]]):
    assert parts_of(prompt, 10) == tuple(Part(weight, ((0, text),)) for text, weight in weighted)


def test_each_part_has_its_own_editing():
    first, second = parts_of("a [b:2] AND [c|d]:0.5", 4)
    assert (first.weight, first.spans) == (1.0, ((0, "a "), (3, "a b")))
    assert second.weight == 0.5 and [second.text_at(step) for step in range(4)] == [" c", " c", " d", " c"]


def test_a_negative_prompt_is_one_part():
    part = negative_of("a AND [b:c:2]:0.5", 10)
    assert part == Part(1.0, ((0, "a AND b:0.5"), (3, "a AND c:0.5")))


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1.0),
                ("house", 1.5730000000000004),
                (" ", 1.1),
                ("on", 1.0),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641000000000006),
                (".", 1.1),
            ],
        ),
        ("", [("", 1.0)]),
        ("((", [("", 1.0)]),
        ("[a]", [("a", 1 / 1.1)]),
        ("(a: 1.3 )", [("a", 1.3)]),
        ("(a:-1)", [("a", -1.0)]),
        ("a:1.2) b]", [("a:1.2) b]", 1.0)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1.1 / 1.1), (" c", 1 / 1.1)]),
        (r"back\slash \\ \(", [(r"backslash \ (", 1.0)]),
        ("[a:b:0.5]", [("a:b:0.5", 1 / 1.1)]),
    ],
)
def test_emphasis_is_that_of_a1111(text: str, pieces: list[tuple[str, float]]):
    assert pieces_of(text) == tuple(Piece(*piece) for piece in pieces)


def test_a_number_that_a1111_fails_on_is_text():
    assert pieces_of("(a:1.2.3)") == (Piece("a:1.2.3", 1.1),)
    assert schedule_of("[a:b:1e999]", 10) == ((10, "a"),)


def test_break_stands_between_pieces():
    assert pieces_of("a BREAK b") == (Piece("a"), BREAK, Piece("b"))
    assert pieces_of("a\nBREAK\n\nBREAK BREAKER") == (Piece("a"), BREAK, Piece(""), BREAK, Piece("BREAKER"))
    assert pieces_of("BREAK") == (Piece(""), BREAK, Piece(""))


def test_break_is_one_inside_brackets_too():
    """A1111 weighs the word there, and so reads it as text of weight -1.1."""
    assert pieces_of("(a BREAK b:1.2)") == (Piece("a", 1.2), BREAK, Piece("b", 1.2))


@pytest.mark.parametrize(
    "text",
    [
        "(" * 40_000,
        "([" * 20_000 + "a" + "])" * 20_000,
        "[a:" * 10_000 + "b" + ":3]" * 10_000,
        "[a|" * 10_000 + "b" + "]" * 10_000,
        "[a:" * 40_000,
        "a :" + " " * 40_000 + "b",
        "(a:" + "1" * 40_000,
        "\\" * 100_001,
        "x AND " * 10_000,
        "(a BREAK b)" * 10_000,
    ],
)
def test_hostile_prompts_are_read(text: str):
    for part in parts_of(text, 4):
        assert pieces_of(part.text_at(3))
