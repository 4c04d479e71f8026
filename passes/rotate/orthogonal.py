"""Orthogonal matrices: Hadamard ones with random signs where their size is one of Sylvester's or Paley's, else random ones."""

from __future__ import annotations

import torch


def rotation(size: int, seed: int, keeps_mean: bool = False) -> torch.Tensor:
    """An orthogonal matrix f64[size, size] that spreads every direction over all; the same for the same seed.

    It is diag(s) H / sqrt(size) with random signs s and a Hadamard matrix H (Ashkboos et al. 2024, QuaRot, arXiv:2404.00456),
    or, where none is known, the Q of a random matrix, which is uniformly distributed. With `keeps_mean` it leaves the vector of ones
    as it is, so that the mean of x and x @ matrix is the same: H P H^T / size with a permutation P of all columns but the first,
    the one of ones, and random signs of them.
    """
    generator = torch.Generator().manual_seed(seed)
    plain = hadamard(size)
    if plain is None:
        first = _uniform(size, generator, keeps_mean)
        return first @ _uniform(size, generator, True).T if keeps_mean else first
    signs = 2.0 * torch.randint(0, 2, (size,), generator=generator).double() - 1
    basis: torch.Tensor = plain / size**0.5
    if not keeps_mean:
        return basis * signs[:, None]
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(size - 1, generator=generator)])
    signs[0] = 1.0
    turned: torch.Tensor = basis[:, order] * signs
    return turned @ basis.T


def hadamard(size: int) -> torch.Tensor | None:
    """A Hadamard matrix f64[size, size], of entries 1 and -1 with ones in its first column; None where no construction gives one.

    Sylvester's product of [[1, 1], [1, -1]] with those of Paley (1933), which there are for q + 1 with a prime q = 3 (mod 4), and
    for 2 (q + 1) with a prime q = 1 (mod 4): 12, 20, 24, 28, 36, 44, 60, ... times a power of 2.
    """
    core = _core(size)
    if core is None:
        return None
    found = _paley(core)
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.double)
    while len(found) < size:
        found = torch.kron(pair, found)
    return found * found[:, :1]


def has_hadamard(size: int) -> bool:
    """Whether `hadamard` gives a matrix of this size."""
    return _core(size) is not None


def _core(size: int) -> int | None:
    """The largest size that a matrix of Paley has and that is `size`, or half of it, a quarter of it, ...: 1 if that is 2^k."""
    while size > 1:
        half = size // 2
        if size % 4 == 0 and (_is_prime(size - 1) or (_is_prime(half - 1) and (half - 1) % 4 == 1)):
            return size
        if size % 2:
            return None
        size = half
    return size


def _paley(size: int) -> torch.Tensor:
    """Paley's matrix of a size that `_core` gave."""
    if size == 1:
        return torch.ones(1, 1, dtype=torch.double)
    if _is_prime(size - 1):
        return torch.eye(size, dtype=torch.double) + _bordered(size - 1, -1.0)
    one = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.double)
    other = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.double)
    half = size // 2
    return torch.kron(_bordered(half - 1, 1.0), one) + torch.kron(torch.eye(half, dtype=torch.double), other)


def _bordered(prime: int, below: float) -> torch.Tensor:
    """f64[prime + 1, prime + 1]: 1 where i - j is a square modulo the prime, -1 where it is none, 0 where i = j; in front a row of
    ones and a column of `below`."""
    squares = torch.full((prime,), -1.0, dtype=torch.double)
    squares[torch.arange(1, prime) ** 2 % prime] = 1.0
    squares[0] = 0.0
    places = torch.arange(prime)
    found = torch.zeros(prime + 1, prime + 1, dtype=torch.double)
    found[0, 1:], found[1:, 0] = 1.0, below
    found[1:, 1:] = squares[(places[:, None] - places[None, :]) % prime]
    return found


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % item for item in range(2, int(number**0.5) + 1))


def _uniform(size: int, generator: torch.Generator, from_ones: bool) -> torch.Tensor:
    """A random orthogonal matrix f64[size, size]; `from_ones`: its first column is that of ones, scaled."""
    values = torch.randn(size, size, generator=generator, dtype=torch.double)
    if from_ones:
        values[:, 0] = 1.0
    found, upper = torch.linalg.qr(values)
    unique: torch.Tensor = found * upper.diagonal().sign()
    return unique
