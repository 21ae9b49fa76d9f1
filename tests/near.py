"""How near two programs must come that compute the same in one precision: the same limit on every machine."""

import numpy as np


def assert_near(found, expected, err_msg="", units=64):
    """Up to what another order of sums changes, in units of eps times the largest number expected (or 1, if that is more).

    The eps is that of the coarser of the two. Sums of a few tens of products are off by less than as many units, whatever
    a processor or a compiler makes of them; a fault changes thousands.
    """
    found, expected = np.asarray(found), np.asarray(expected)
    eps = max(np.finfo(x.dtype).eps for x in (found, expected) if x.dtype.kind == "f")
    top = np.abs(expected[np.isfinite(expected)]).max(initial=1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=units * eps * top, err_msg=err_msg)
