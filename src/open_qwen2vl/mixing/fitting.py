"""From the losses of proxies to a mixture: a regression of each domain's loss on the weights, and its best mixtures.

Three forms are tried (linear, as RegMix; quadratic, Scheffé's polynomial for mixtures; a Gaussian process), and for
each domain that is taken which predicts left-out proxies best. The best of many drawn mixtures are averaged, as RegMix
does, on resampled proxies again and again: the proposal is the mean of that, its uncertainty the spread.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CANDIDATES, BEST = 10_000, 20  # mixtures that are drawn, and of which the mean is taken
RESAMPLES = 100
FOLDS = 5
INTERVAL = (5, 95)  # percentiles


@dataclass
class Fit:
    """The loss of a domain as a function of the weights.

    Attributes:
        form (`str`): that was taken.
        errors (`dict[str, float]`): of each form, root mean square on left-out proxies, in nats per label.
        spread (`float`): standard deviation of the measured losses, what a constant would be off by.
        predicted (`np.ndarray`): `(mixtures,)`, each by a fit that did not know it.
        rank (`float`): Spearman's correlation of these with the measured losses.
    """

    form: str
    errors: dict[str, float]
    spread: float
    predicted: np.ndarray
    rank: float


@dataclass
class Proposal:
    """Weights and what is expected of them.

    Attributes:
        weights (`np.ndarray`): `(sources,)`, sum 1.
        interval (`np.ndarray`): `(2, sources)`, percentiles 5 and 95.
        losses (`dict[str, tuple[float, float, float]]`): of named mixtures the target's loss, with both percentiles.
    """

    weights: np.ndarray
    interval: np.ndarray
    losses: dict[str, tuple[float, float, float]]


def forms(sources: int) -> dict[str, Any]:
    """Regressors of scikit-learn by their names; all take losses that are centred."""
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import PolynomialFeatures

    # Weights sum to 1, so that a constant and squares are among the products already.
    products = PolynomialFeatures(2, interaction_only=True, include_bias=False)
    kernel = ConstantKernel(1.0, (0.01, 100)) * RBF([0.5] * sources, (0.1, 10)) + WhiteKernel(0.05, (1e-4, 1))
    return {
        "linear": Ridge(1e-6, fit_intercept=False),
        "quadratic": make_pipeline(products, Ridge(1e-3, fit_intercept=False)),
        "gaussian process": GaussianProcessRegressor(kernel, normalize_y=True, random_state=0),
    }


def fit_domain(weights: np.ndarray, losses: np.ndarray) -> Fit:
    """Choose the form for a domain by cross-validation.

    Args:
        weights (`np.ndarray`): `(mixtures, sources)`.
        losses (`np.ndarray`): `(mixtures,)`.
    """
    from scipy.stats import spearmanr
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import KFold, cross_val_predict

    quiet = warnings.catch_warnings(action="ignore", category=ConvergenceWarning)  # a bound is a bound
    folds = KFold(min(FOLDS, len(losses)), shuffle=True, random_state=0)
    centred = losses - losses.mean()
    with quiet:
        found = {
            name: cross_val_predict(form, weights, centred, cv=folds) for name, form in forms(weights.shape[1]).items()
        }
    errors = {name: float(np.sqrt(np.mean((one - centred) ** 2))) for name, one in found.items()}
    best = min(errors, key=errors.get)
    rank = float(spearmanr(found[best], losses).statistic) if np.ptp(losses) and np.ptp(found[best]) else 0.0
    return Fit(best, errors, float(losses.std()), found[best] + losses.mean(), rank)


def propose(
    weights: np.ndarray,
    losses: np.ndarray,
    chosen: Sequence[str],
    target: np.ndarray,
    prior: np.ndarray,
    named: dict[str, np.ndarray],
    seed: int,
) -> Proposal:
    """Look for the mixture of the lowest target.

    Args:
        weights (`np.ndarray`): `(mixtures, sources)` of the proxies.
        losses (`np.ndarray`): `(mixtures, domains)`.
        chosen (`Sequence[str]`): the form of each domain.
        target (`np.ndarray`): `(domains,)`, how much each counts, sum 1.
        prior (`np.ndarray`): `(sources,)`, of the Dirichlet distribution.
        named (`dict[str, np.ndarray]`): mixtures whose loss is to be foretold beside the proposal's.
        seed (`int`): of candidates and resampling.
    """
    generator = np.random.default_rng(seed)
    candidates = generator.dirichlet(prior, CANDIDATES)
    shown = np.array(list(named.values()))
    models = [_settled(forms(weights.shape[1])[form], weights, column) for form, column in _columns(chosen, losses)]
    proposals, foretold = [], []
    for _ in range(RESAMPLES):
        rows = generator.integers(len(weights), size=len(weights))
        fits = [_fitted(model, weights[rows], column[rows]) for model, column in zip(models, losses.T, strict=True)]
        found = _target(fits, target, candidates)
        proposals.append(candidates[np.argsort(found, kind="stable")[:BEST]].mean(0))
        foretold.append(fits)
    best = np.mean(proposals, axis=0)
    points = np.vstack([best, shown])
    values = np.array([_target(fits, target, points) for fits in foretold])
    low, high = np.percentile(values, INTERVAL, axis=0)
    losses_of = {
        name: (float(values[:, i].mean()), float(low[i]), float(high[i]))
        for i, name in enumerate(["proposal", *named])
    }
    return Proposal(best, np.percentile(proposals, INTERVAL, axis=0), losses_of)


def _columns(chosen: Sequence[str], losses: np.ndarray) -> list[tuple[str, np.ndarray]]:
    return list(zip(chosen, losses.T, strict=True))


def _settled(form: Any, weights: np.ndarray, losses: np.ndarray) -> Any:
    """A form with the kernel of all proxies: of a resample, a process would take repeats for certainty."""
    if not hasattr(form, "kernel"):
        return form
    with warnings.catch_warnings(action="ignore"):  # of a bound that is reached
        form.fit(weights, losses - losses.mean())
    return form.set_params(kernel=form.kernel_, optimizer=None)


def _fitted(form: Any, weights: np.ndarray, losses: np.ndarray) -> tuple[Any, float]:
    from sklearn.base import clone

    return clone(form).fit(weights, losses - losses.mean()), float(losses.mean())


def _target(fits: list[tuple[Any, float]], target: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return sum(share * (fit.predict(weights) + mean) for share, (fit, mean) in zip(target, fits, strict=True))
