"""Which of the tests marked `sampled` a run chooses."""

from types import SimpleNamespace

from tests.sampled import sample

ITEMS = [
    SimpleNamespace(nodeid=f"test[{i}]", get_closest_marker=lambda name, i=i: name == "sampled" and i % 2 == 1)
    for i in range(100)
]


def test_a_fifth_of_those_marked_and_all_others():
    kept, left_out = sample(ITEMS, 1)
    assert len(left_out) == 40 and all(item.get_closest_marker("sampled") for item in left_out)
    assert sorted(map(ITEMS.index, kept + left_out)) == list(range(100))
    assert kept == sorted(kept, key=ITEMS.index)


def test_processes_with_one_seed_choose_the_same_and_other_seeds_others():
    assert sample(ITEMS, 1) == sample(ITEMS, 1)
    assert sample(ITEMS, 1) != sample(ITEMS, 2)


def test_of_a_single_one_nothing_is_left_out():
    assert sample(ITEMS[:2], 1) == (ITEMS[:2], [])
