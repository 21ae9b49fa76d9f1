"""Where a formula as written would lose its digits: each claim is one that the textbook form fails."""

import numpy as np

import kvattn


def test_distance_does_not_cancel(backend):
    """|q|^2 + |k|^2 - 2 q.k in float32 has errors of 0.1 here, where |q - k|^2 / 2 is 1e-4."""
    rng = np.random.default_rng(0)
    query = rng.standard_normal((4, 16))
    query = (1e3 * query / np.linalg.norm(query, axis=-1, keepdims=True)).astype(np.float32)
    key = (query + 1e-2 * rng.standard_normal((4, 16))).astype(np.float32)
    wide = query.astype(np.float64)[:, None] - key.astype(np.float64)
    expected = np.sqrt((wide**2).sum(axis=-1))
    found = np.sqrt(-2 * kvattn.to_numpy(kvattn.distance_score(query, key, backend=backend)).astype(np.float64))
    assert expected.diagonal().max() < 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_cosine_of_a_zero_vector_is_zero_with_zero_gradient(backend):
    query, key = np.zeros((2, 3), np.float32), np.eye(3, dtype=np.float32)
    assert not kvattn.to_numpy(kvattn.cosine_score(query, key, backend=backend)).any()
    ones = np.ones((2, 3), np.float32)
    gradients = kvattn.attention_grad(query, key, key, ones, score=kvattn.cosine_score, backend=backend)
    assert not kvattn.to_numpy(gradients[0]).any()
    assert all(np.isfinite(kvattn.to_numpy(g)).all() for g in gradients)


def test_equal_vectors_have_a_finite_gradient_under_every_kernel(backend):
    x, ones = np.ones((2, 3), np.float32), np.ones((2, 1), np.float32)
    for name in ("gaussian", "boxcar", "triangular", "epanechnikov", "constant"):
        gradients = kvattn.attention_grad(
            x, x, ones, ones, score=getattr(kvattn, f"{name}_kernel"), normalize=kvattn.proportional, backend=backend
        )
        assert all(np.isfinite(kvattn.to_numpy(g)).all() for g in gradients), name


def test_a_kernel_has_no_slope_at_its_edge(backend):
    query, key, value = np.zeros((1, 1)), np.array([[1.0], [-1.0]]), np.array([[1.0], [3.0]])
    for kernel in (kvattn.triangular_kernel, kvattn.epanechnikov_kernel, kvattn.boxcar_kernel):
        how = {"score": kernel, "normalize": kvattn.identity, "backend": backend}
        for grad in kvattn.attention_grad(query, key, value, np.ones((1, 1)), **how):
            assert not kvattn.to_numpy(grad).any(), kernel


def test_ties_go_to_the_first(backend):
    weights = kvattn.hardmax(np.array([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]]), backend=backend)
    np.testing.assert_array_equal(kvattn.to_numpy(weights), [[0, 1, 0], [1, 0, 0]])


def test_the_four_kinds_of_weights_are_one_call_each(backend):
    rng = np.random.default_rng(0)
    query, key, value = rng.random((2, 3)), rng.random((5, 3)), rng.random((5, 1))

    def weights(**options):
        return kvattn.to_numpy(kvattn.attention(query, key, value, return_weights=True, **options, backend=backend)[1])

    cone = weights(score=kvattn.gaussian_kernel, normalize=kvattn.identity)
    assert (cone >= 0).all()
    convex = weights()
    assert (convex > 0).all()
    np.testing.assert_allclose(convex.sum(axis=-1), 1)
    np.testing.assert_array_equal(np.sort(weights(normalize=kvattn.hardmax), axis=-1), [[0, 0, 0, 0, 1]] * 2)
    np.testing.assert_allclose(weights(normalize=kvattn.average), np.full((2, 5), 0.2))


def test_your_own_score_and_normaliser_work(backend, tab):
    """A score and a normaliser of the user's own, written with operators that every framework's arrays have."""
    rng = np.random.default_rng(0)
    query, key, value = (tab.asarray(rng.random((2, 3, 4))) for _ in range(3))

    def doubled(q, k):
        return 2 * kvattn.dot_score(q, k)

    def halved(scores, where=None):
        return kvattn.identity(scores, where) / 2

    found = kvattn.attention(query, key, value, score=doubled, normalize=halved, mask=np.tri(3, dtype=bool))
    q, k, v = map(kvattn.to_numpy, (query, key, value))
    np.testing.assert_allclose(kvattn.to_numpy(found), np.where(np.tri(3), q @ k.swapaxes(-1, -2), 0) @ v)


def test_dropout_keeps_the_expectation_and_returns_the_weights_before_it(backend, tab):
    x = np.ones((1, 64), np.float32)
    rng = {"numpy": lambda: np.random.default_rng(0), "jax": lambda: __import__("jax").random.key(0)}.get(
        backend, lambda: None
    )()
    key, value = np.zeros((4096, 64), np.float32), np.ones((4096, 1), np.float32)
    output, weights = kvattn.attention(x, key, value, dropout=0.5, rng=rng, return_weights=True, backend=backend)
    np.testing.assert_allclose(kvattn.to_numpy(weights), 1 / 4096)
    assert abs(float(kvattn.to_numpy(output)[0, 0]) - 1) < 0.1, "six standard deviations"
    assert float(kvattn.to_numpy(output)[0, 0]) != 1
