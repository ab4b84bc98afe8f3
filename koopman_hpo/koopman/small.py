"""Eigenvalues of small real matrices, without LAPACK's call: symmetric with vectors, general without.

A search over delays and ranks needs some dozens of them, of 1 to 40 rows: LAPACK would spend most of its time on
entry.  Real arithmetic keeps conjugate pairs exact.  Sources: Golub and Van Loan, "Matrix Computations", sections
7.5 and 8.3; the shifts as in EISPACK's tql2 and hqr.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_FLAGS = {"contract", "reassoc", "nsz"}  # sums in vector registers


@njit(cache=True, nogil=True, fastmath=_FLAGS)
def dot(x, y):
    """Sum of products, in any order."""
    s = 0.0
    for i in range(x.shape[0]):
        s += x[i] * y[i]
    return s


@njit(cache=True, nogil=True)
def multiply(A, B):
    """A B of a few rows: BLAS's entry takes longer."""
    out = np.zeros((A.shape[0], B.shape[1]))
    for i in range(A.shape[0]):
        for k in range(A.shape[1]):
            for j in range(B.shape[1]):
                out[i, j] += A[i, k] * B[k, j]
    return out


@njit(cache=True, nogil=True, fastmath=_FLAGS)
def rank_two(A, Z, k, v, half, p, u):
    """In place: the reflection along v (n - k - 1,) of the trailing block of A from both sides, and of the rows of Z.

    p: beta A v, u: beta v' Z, both (n,), p from k + 1 on; half: beta / 2 p' v.
    """
    n = A.shape[0]
    for i in range(k + 1, n):
        p[i] -= half * v[i - k - 1]
    for i in range(k + 1, n):
        x, y = v[i - k - 1], p[i]
        for j in range(k + 1, n):
            A[i, j] -= x * p[j] + y * v[j - k - 1]
        for j in range(n):
            Z[i, j] -= x * u[j]


@njit(cache=True, nogil=True, fastmath=_FLAGS)
def tridiagonal(A, d, e, Z):
    """Z A Z' = T with diagonal d (n,) and off-diagonal e (n,), by reflections.  A, overwritten, and Z: (n, n)."""
    n = A.shape[0]
    for i in range(n):
        for j in range(n):
            Z[i, j] = 1.0 if i == j else 0.0
    p, u = np.empty(n), np.empty(n)
    for k in range(n - 2):
        v = A[k, k + 1 :]
        alpha = np.sqrt(dot(v, v))
        if v[0] > 0.0:
            alpha = -alpha
        d[k], e[k] = A[k, k], alpha
        if alpha == 0.0:
            continue
        v[0] -= alpha
        beta = 2.0 / dot(v, v)
        for j in range(n):
            u[j] = 0.0
        half = 0.0
        for i in range(k + 1, n):
            x = beta * v[i - k - 1]
            y = 0.0
            for j in range(k + 1, n):
                y += A[i, j] * v[j - k - 1]
            p[i] = beta * y
            half += 0.5 * x * p[i]
            for j in range(n):
                u[j] += x * Z[i, j]
        rank_two(A, Z, k, v, half, p, u)
    for k in range(max(0, n - 2), n):
        d[k], e[k] = A[k, k], A[k, k + 1] if k + 1 < n else 0.0


@njit(cache=True, nogil=True)
def chase(d, e, Z, l, m):
    """One implicit QL step with Wilkinson's shift on the block l..m of the tridiagonal d, e; rows of Z follow."""
    g = (d[l + 1] - d[l]) / (2.0 * e[l])
    r = np.sqrt(g * g + 1.0)
    g = d[m] - d[l] + e[l] / (g + (r if g >= 0.0 else -r))
    s, c, p = 1.0, 1.0, 0.0
    for i in range(m - 1, l - 1, -1):
        f, b = s * e[i], c * e[i]
        r = np.sqrt(f * f + g * g)
        e[i + 1] = r
        if r == 0.0:
            d[i + 1] -= p
            e[m] = 0.0
            return
        s, c = f / r, g / r
        g = d[i + 1] - p
        r = (d[i] - g) * s + 2.0 * c * b
        p = s * r
        d[i + 1] = g + p
        g = c * r - b
        for k in range(Z.shape[1]):
            x, y = Z[i, k], Z[i + 1, k]
            Z[i + 1, k] = s * x + c * y
            Z[i, k] = c * x - s * y
    d[l] -= p
    e[l], e[m] = g, 0.0


@njit(cache=True, nogil=True)
def symmetric(A):
    """All eigenvalues (n,) and eigenvectors (n, n), one a row, of a symmetric matrix, which is overwritten; unsorted."""
    n = A.shape[0]
    d, e, Z = np.empty(n), np.empty(n), np.empty((n, n))
    tridiagonal(A, d, e, Z)
    for l in range(n):
        for _ in range(60):
            m = l
            while m < n - 1 and abs(e[m]) > 1.1e-16 * (abs(d[m]) + abs(d[m + 1])):
                m += 1
            if m == l:
                break
            chase(d, e, Z, l, m)
    return d, Z


@njit(cache=True, nogil=True)
def descending(s):
    """Indices (n,) that sort s (n,) from large to small, by selection: n is small, and a sort is long to compile."""
    n = s.shape[0]
    order = np.empty(n, np.int64)
    for k in range(n):
        order[k] = k
    for k in range(n):
        best = k
        for i in range(k + 1, n):
            if s[order[i]] > s[order[best]]:
                best = i
        order[k], order[best] = order[best], order[k]
    return order


@njit(cache=True, nogil=True)
def solve(A, B):
    """A^-1 B by elimination with partial pivoting.  A: (r, r); B: (r, c).

    Raises:
      LinAlgError: a pivot is zero or not finite.
    """
    r, c = B.shape
    A, X = A.copy(), B.copy()
    for k in range(r):
        pivot = k
        for i in range(k + 1, r):
            if abs(A[i, k]) > abs(A[pivot, k]):
                pivot = i
        if not 0.0 < abs(A[pivot, k]) < np.inf:
            raise np.linalg.LinAlgError("singular matrix")
        for j in range(r):
            A[k, j], A[pivot, j] = A[pivot, j], A[k, j]
        for j in range(c):
            X[k, j], X[pivot, j] = X[pivot, j], X[k, j]
        for i in range(k + 1, r):
            f = A[i, k] / A[k, k]
            for j in range(k, r):
                A[i, j] -= f * A[k, j]
            for j in range(c):
                X[i, j] -= f * X[k, j]
    for k in range(r - 1, -1, -1):
        for j in range(c):
            for i in range(k + 1, r):
                X[k, j] -= A[k, i] * X[i, j]
            X[k, j] /= A[k, k]
    return X


@njit(cache=True, nogil=True)
def hessenberg(A):
    """In place: A (n, n) to upper Hessenberg form with the same eigenvalues, by pivoted elimination."""
    n = A.shape[0]
    for k in range(1, n - 1):
        pivot = k
        for i in range(k + 1, n):
            if abs(A[i, k - 1]) > abs(A[pivot, k - 1]):
                pivot = i
        if A[pivot, k - 1] == 0.0:
            continue
        if pivot != k:
            for j in range(k - 1, n):
                A[pivot, j], A[k, j] = A[k, j], A[pivot, j]
            for i in range(n):
                A[i, pivot], A[i, k] = A[i, k], A[i, pivot]
        for i in range(k + 1, n):
            s = A[i, k - 1] / A[k, k - 1]
            A[i, k - 1] = 0.0
            for j in range(k, n):
                A[i, j] -= s * A[k, j]
            for j in range(n):
                A[j, k] += s * A[j, i]


@njit(cache=True, nogil=True)
def two_by_two(a, b, c, d):
    """Both eigenvalues of [[a, b], [c, d]]; a pair has the positive imaginary part first."""
    p = 0.5 * (a - d)
    q = p * p + b * c
    z = np.sqrt(abs(q))
    if q < 0.0:
        return complex(d + p, z), complex(d + p, -z)
    z = p + (z if p >= 0.0 else -z)
    return complex(d + z, 0.0), complex(d - b * c / z if z != 0.0 else d + z, 0.0)


@njit(cache=True, nogil=True)
def reflect(H, k, lo, hi, p, q, r):
    """In place: the reflection that maps (p, q, r) to its first axis, on rows and columns k..k + 2 (or k + 1)."""
    s = np.sqrt(p * p + q * q + r * r)
    if s == 0.0:
        return
    if p < 0.0:
        s = -s
    x, y, z = (p + s) / s, q / s, r / s
    q, r = q / (p + s), r / (p + s)
    three = k + 2 <= hi
    for j in range(lo, hi + 1):
        f = H[k, j] + q * H[k + 1, j]
        if three:
            f += r * H[k + 2, j]
            H[k + 2, j] -= f * z
        H[k, j] -= f * x
        H[k + 1, j] -= f * y
    for i in range(lo, min(hi, k + 3) + 1):
        f = x * H[i, k] + y * H[i, k + 1]
        if three:
            f += z * H[i, k + 2]
            H[i, k + 2] -= f * r
        H[i, k] -= f
        H[i, k + 1] -= f * q


@njit(cache=True, nogil=True)
def sweep(H, lo, hi, s, t):
    """In place: one implicit double-shift QR sweep on the active block lo..hi; shifts of sum s and product t."""
    a, b, c, d = H[lo, lo], H[lo, lo + 1], H[lo + 1, lo], H[lo + 1, lo + 1]
    p, q, r = a * a + b * c - s * a + t, c * (a + d - s), c * H[lo + 2, lo + 1]
    for k in range(lo, hi):
        if k > lo:
            p, q = H[k, k - 1], H[k + 1, k - 1]
            r = H[k + 2, k - 1] if k + 2 <= hi else 0.0
        reflect(H, k, lo, hi, p, q, r)
        if k > lo:
            H[k + 1, k - 1] = 0.0
            if k + 2 <= hi:
                H[k + 2, k - 1] = 0.0


@njit(cache=True, nogil=True)
def francis(H, out):
    """out (n,) <- eigenvalues of the Hessenberg matrix H, which is overwritten.  False: no convergence, or not finite.

    Shifts as in LAPACK's dlahqr.
    """
    hi, tries = H.shape[0] - 1, 0
    while hi >= 0:
        lo = hi
        while lo > 0:
            size = abs(H[lo - 1, lo - 1]) + abs(H[lo, lo])
            if abs(H[lo, lo - 1]) <= 1.1e-16 * size:
                H[lo, lo - 1] = 0.0
                break
            lo -= 1
        if lo == hi:
            out[hi] = complex(H[hi, hi], 0.0)
            hi, tries = hi - 1, 0
        elif lo == hi - 1:
            out[lo], out[hi] = two_by_two(H[lo, lo], H[lo, hi], H[hi, lo], H[hi, hi])
            hi, tries = hi - 2, 0
        elif tries == 60:
            return False
        else:
            a, b, c, d = H[hi - 1, hi - 1], H[hi - 1, hi], H[hi, hi - 1], H[hi, hi]
            s, t = a + d, a * d - b * c
            if 0.25 * s * s >= t:  # two real shifts pull apart and may cycle: the one nearer to the corner, twice
                one, two = two_by_two(a, b, c, d)
                near = one.real if abs(one.real - d) <= abs(two.real - d) else two.real
                s, t = 2.0 * near, near * near
            if tries % 10 == 9:  # a shift out of the ordinary breaks a cycle
                s = 1.5 * (abs(c) + abs(H[hi - 1, hi - 2]))
                t = (abs(c) + abs(H[hi - 1, hi - 2])) ** 2
            sweep(H, lo, hi, s, t)
            tries += 1
    total = 0.0
    for z in out:
        total += abs(z)
    return np.isfinite(total)
