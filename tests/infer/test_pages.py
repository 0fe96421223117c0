"""The pool of pages: who holds what, and what is known of it."""

from jaxchat.infer.pages import PagePool

TEXT = list(range(10))


def filled(pool, tokens):
    """Pages of a row that has cached `tokens`."""
    match = pool.match(tokens)
    pool.hold(match.pages)
    pages = match.pages + pool.take(pool.pages_for(len(tokens)) - len(match.pages))
    pool.learn(tokens, pages)
    return pages


def test_full_pages_are_shared_and_the_rest_has_a_donor():
    pool = PagePool(8, 4)
    pages = filled(pool, TEXT)
    assert len(pages) == 3 and pool.available == 5
    assert pool.match(TEXT) == (pages[:2], pages[2], 2)
    assert pool.match([*TEXT[:6], 99, 98]) == (pages[:1], pages[1], 2)
    assert pool.match(TEXT[:7]) == (pages[:1], pages[1], 3)
    assert pool.match([5, *TEXT]) == ([], None, 0)
    assert pool.match([]) == ([], None, 0)


def test_a_page_is_known_by_all_that_comes_before_it():
    pool = PagePool(8, 2)
    first, second = filled(pool, [1, 2, 7, 7]), filled(pool, [3, 4, 7, 7])
    assert not set(first) & set(second)
    assert pool.match([1, 2, 7, 7]).pages == first
    assert pool.match([3, 4, 7, 7]).pages == second
    assert pool.match([7, 7]).pages == []


def test_released_pages_stay_known_until_their_memory_is_needed():
    pool = PagePool(4, 2)
    old = filled(pool, [1, 2, 3, 4])
    pool.release(old)
    new = filled(pool, [5, 6, 7, 8])
    pool.release(new)
    assert pool.available == 4
    again = pool.match([1, 2, 3, 4]).pages
    assert again == old
    pool.hold(again)
    pool.release(again)  # used last
    taken = pool.take(2)
    assert set(taken) == set(new) and pool.match([1, 2, 3, 4]).pages == old and pool.match([5, 6]).pages == []


def test_the_end_of_a_text_goes_before_its_beginning():
    pool = PagePool(3, 2)
    pages = filled(pool, [1, 2, 3, 4, 5, 6])
    pool.release(pages)
    for left in (2, 1, 0):
        pool.take(1)
        assert pool.match([1, 2, 3, 4, 5, 6]).pages == pages[:left]


def test_a_page_is_held_as_often_as_it_is_shared():
    pool = PagePool(4, 2)
    first = filled(pool, [1, 2, 3, 4])
    second = filled(pool, [1, 2, 3, 4])
    assert first == second and pool.available == 2
    pool.release(first)
    assert pool.available == 2
    assert pool.fits(4, first) and not pool.fits(5, first)  # pages that are held take none of the others
    assert not pool.fits(3, [])
    pool.release(second)
    assert pool.available == 4
    assert pool.fits(4, first) and not pool.fits(5, first)  # cached ones do


def test_a_page_that_fills_up_is_known_by_its_longer_text():
    pool = PagePool(4, 4)
    pages = filled(pool, [1, 2])
    pool.learn([1, 2, 3], pages)
    assert pool.match([1, 2, 3, 4]) == ([], pages[0], 3)
    pool.learn([1, 2, 3, 4], pages)
    assert pool.match([1, 2, 3, 4, 5]) == (pages, None, 0)
    pool.release(pages)
    pool.take(4)
    assert pool.match([1, 2, 3, 4]) == ([], None, 0)


def test_two_rows_that_computed_the_same_keep_one():
    pool = PagePool(4, 2)
    first, second = pool.take(2), pool.take(2)
    pool.learn([1, 2, 3, 4], first)
    pool.learn([1, 2, 3, 4], second)
    pool.release(second)
    pool.release(first)
    assert pool.match([1, 2, 3, 4]).pages == first
    assert pool.available == 4 and set(pool.take(4)) == {0, 1, 2, 3}


def test_what_is_known_survives_that_the_page_before_it_is_taken():
    """A row that had computed the first page too keeps its own second page, and makes both known again."""
    pool = PagePool(4, 2)
    first, second = pool.take(1), pool.take(2)
    pool.learn([1, 2], first)
    pool.learn([1, 2, 3, 4], second)
    assert pool.match([1, 2, 3, 4]).pages == [first[0], second[1]]
    pool.release(first)
    pool.take(2)  # the free one, and that of the first row
    pool.learn([1, 2, 3, 4], second)
    assert pool.match([1, 2, 3, 4]).pages == second
    pool.release(second)
    pool.take(1)
    assert pool.match([1, 2, 3, 4]) == (second[:1], None, 0)


def test_other_parameters_forget_everything():
    pool = PagePool(4, 2)
    held, cached = filled(pool, [1, 2]), filled(pool, [3, 4, 5])
    pool.release(cached)
    pool.forget_all()
    assert pool.match([1, 2]).pages == pool.match([3, 4]).pages == [] and pool.available == 3
    pool.release(held)
    assert set(pool.take(4)) == {0, 1, 2, 3}
