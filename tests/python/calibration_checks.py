"""What the calibration tests share: the statistics written plainly in NumPy."""

import numpy as np


def rows_of(seed, n, width):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, width)) * rng.uniform(0.1, 4, width) + rng.standard_normal(width)).astype(np.float32)


def check(calibration, layer, x, timesteps, groups, total):
    """Every statistic of a layer against NumPy, over rows x and their timesteps."""
    x64 = x.astype(np.float64)
    group = ((timesteps.astype(np.int64) + 1) * groups - 1) // total
    for g in range(groups):
        rows = x64[group == g]
        s = calibration.stats(layer, g)
        if len(rows) == 0:
            assert s is None
            continue
        assert s["count"] == len(rows)
        np.testing.assert_allclose(s["sum"], rows.sum(0), rtol=1e-12, atol=1e-9)
        np.testing.assert_allclose(s["sum_sq"], (rows**2).sum(0), rtol=1e-12)
        np.testing.assert_allclose(s["mean"], rows.mean(0), rtol=1e-12, atol=1e-9)
        np.testing.assert_allclose(s["std"], rows.std(0), rtol=1e-6, atol=1e-7 * abs(rows).max())
        for name, values in (("absmax", abs(rows).max(0)), ("min", rows.min(0)), ("max", rows.max(0))):
            np.testing.assert_array_equal(s[name], values.astype(np.float32))
    h, exact = calibration.hessian(layer), x64.T @ x64 / len(x64)
    bound = np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
    assert (abs(h - exact) <= 3e-5 * bound).all() and np.array_equal(h, h.T)
    np.testing.assert_allclose(calibration.diagonal(layer), np.diag(exact), rtol=1e-6)
