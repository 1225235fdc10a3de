"""What methods need of a student adds up, and nothing is nothing."""

from student_train.methods.base import StudentNeeds


def test_needs_add_up() -> None:
    one = StudentNeeds(hidden_layers=frozenset({1, 2}))
    other = StudentNeeds(hidden_layers=frozenset({2, 3}), attention_layers=frozenset({2}), head=True)
    both = StudentNeeds(hidden_layers=frozenset({1, 2, 3}), attention_layers=frozenset({2}), head=True)
    assert one | other == other | one == both
    assert StudentNeeds() | one == one


def test_any_need_is_one() -> None:
    assert not StudentNeeds()
    assert StudentNeeds(hidden_layers=frozenset({0})) and StudentNeeds(attention_layers=frozenset({1}))
    assert StudentNeeds(head=True)
