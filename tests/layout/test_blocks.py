"""Regions, tiles and the invariants of a Layout."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fusectl.layout.blocks import Block, Layout, Term, intersect, shifted, size, tiles, whole


shapes = st.lists(st.integers(1, 7), min_size=0, max_size=3).map(tuple)


@given(shapes, st.data())
def test_tiles_cover_every_element_once(shape, data):
    tile = tuple(data.draw(st.integers(1, 9)) for _ in shape)
    counts = np.zeros(shape, int)

    for region in tiles(shape, tile):
        counts[tuple(slice(r.start, r.stop) for r in region)] += 1

    assert (counts == 1).all()


def test_regions_without_common_elements_have_no_intersection():
    assert intersect((range(3), range(4)), (range(3, 5), range(4))) is None
    assert intersect((range(3), range(4)), (range(2, 5), range(1, 9))) == (range(2, 3), range(1, 4))


def test_scalars_have_one_region():
    assert list(tiles((), ())) == [()]
    assert intersect((), ()) == ()
    assert size(whole(())) == 1


def test_shifted_keeps_the_place_inside_the_block():
    block, source = (range(10, 16), range(4)), (range(6), range(20, 24))

    assert shifted((range(12, 14), range(1, 2)), block, source) == (range(2, 4), range(21, 22))


def test_a_layout_knows_its_contradictions():
    inside = Block((range(2), range(3)), (Term(0, "a", (range(2), range(3))),))
    overlapping = Block((range(1, 3), range(3)), (Term(1, "a", (range(2), range(3))),))
    outside = Block((range(3, 5), range(3)), (Term(1, "a", (range(2), range(3))),))
    misfit = Block((range(2, 4), range(3)), (Term(1, "a", (range(3), range(3))),))

    def problems(*blocks):
        return list(Layout(("x", "y"), (4, 3), "float32", blocks).problems())

    assert problems(inside) == []
    assert "overlap" in problems(inside, overlapping)[0]
    assert "leaves the tensor" in problems(outside)[0]
    assert "another shape" in problems(misfit)[0]
