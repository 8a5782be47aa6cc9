"""Log-linear scaling laws of acceptance: fits with intervals, and how far they can be trusted.

The forms are those of "Scaling Laws for Speculative Decoding" (arXiv 2505.07858, theorems 1.1 to
1.3): tokens a target call rise with the logarithm of the draft model's training tokens and with
that of its capacity, and the speed falls with that of the batch size. (Acceptance rate means tokens
a round there.) Ours differ in two ways: several logarithms may stand in one fit, and near a bound,
which no line can respect, the logit is fitted beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import linalg, special, stats

from specdec.errors import ConfigError

CONFIDENCE = 0.95
NEAR = 0.8  # of the way between the bounds; from here on a line overshoots
_RESAMPLES = 5000
_SPARE_POINTS = 2  # more points than coefficients: with fewer there are no residuals to speak of


@dataclass(frozen=True)
class Points:
    """Measured points.

    Attributes:
        x_names: what the logarithms are of.
        y_name: what was measured.
        x: ``[n, k]`` float64, positive.
        y: ``[n]`` float64.

    Raises:
        ConfigError: for values that have no logarithm, or points too few or too alike for a fit
            that leaves the largest out.
    """

    x_names: tuple[str, ...]
    y_name: str
    x: np.ndarray
    y: np.ndarray

    def __post_init__(self) -> None:
        if not (np.isfinite(self.x).all() and np.isfinite(self.y).all()):
            raise ConfigError("points must be finite numbers")
        if not (self.x > 0).all():
            raise ConfigError(
                f"{', '.join(self.x_names)}: expected positive numbers, as their logarithm is "
                f"taken, got {self.x.min():g}"
            )
        needed = len(self.x_names) + 1 + _SPARE_POINTS
        fitted = len(self.y) - int(self.largest.sum())
        if fitted < needed:
            raise ConfigError(
                f"a fit of {', '.join(self.x_names)} needs {needed} points besides the largest, "
                f"got {fitted}"
            )
        if np.linalg.matrix_rank(_design(self.x[~self.largest])) <= len(self.x_names):
            raise ConfigError(
                f"{', '.join(self.x_names)} do not vary independently of one another in the points "
                "besides the largest, so their effects cannot be told apart"
            )

    @property
    def largest(self) -> np.ndarray:
        """``[n]`` bool: the points that are largest in the first x, to be held out."""
        largest: np.ndarray = self.x[:, 0] == self.x[:, 0].max()
        return largest


@dataclass(frozen=True)
class Fit:
    """``y = intercept + slopes . ln(x)``, or the same of the logit of y between its bounds.

    Attributes:
        slopes: one for each x, per unit of ln(x).
        intercept: at x = 1.
        intervals: ``[k + 1, 2]`` 95 % intervals of the slopes and, last, the intercept: bootstrap
            of residuals, each scaled up for what its own point pulled the fit towards itself.
        r_squared: share of the variance of y, on y's own scale, that the fit accounts for.
        rmse: root of the mean squared residual, on y's own scale.
        bounds: of y, None for the plain line.
    """

    slopes: tuple[float, ...]
    intercept: float
    intervals: np.ndarray
    r_squared: float
    rmse: float
    bounds: tuple[float, float] | None = None

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Returns ``[n]`` values of y for x ``[n, k]``."""
        return _from_scale(_design(x) @ np.array([*self.slopes, self.intercept]), self.bounds)


@dataclass(frozen=True)
class Extrapolation:
    """How a fit without the largest point foretells it.

    Attributes:
        fit: of the other points.
        predicted: mean over the held-out points.
        measured: mean over the held-out points.
        interval: 95 % prediction interval of one measurement there, by Student's t.
        flat_error: error of the guess that nothing changes beyond the largest point of the fit:
            what a law must beat to be worth having.
    """

    fit: Fit
    predicted: float
    measured: float
    interval: tuple[float, float]
    flat_error: float

    @property
    def error(self) -> float:
        """Predicted - measured."""
        return self.predicted - self.measured


@dataclass(frozen=True)
class Law:
    """A form fitted to all points, and tried on the largest."""

    form: str
    fit: Fit
    held_out: Extrapolation


def fit_laws(points: Points, bounds: tuple[float, float] | None = None) -> list[Law]:
    """Returns the log-linear law; behind it the one of the logit, where y comes near a bound.

    Args:
        points: measured.
        bounds: between which y must lie by what it is: (0, 1) for a rate, (1, depth + 1) for
            tokens a target call.

    Raises:
        ConfigError: if a y lies outside the bounds.
    """
    laws = [Law("line", _fit(points.x, points.y), _hold_out(points))]
    if bounds is not None:
        low, high = bounds
        if not (low < points.y).all() or not (points.y < high).all():
            raise ConfigError(
                f"{points.y_name}: expected numbers between {low:g} and {high:g}, got "
                f"{points.y.min():g} to {points.y.max():g}"
            )
        if near_bound(points, bounds):
            laws.append(Law("logit", _fit(points.x, points.y, bounds), _hold_out(points, bounds)))
    return laws


def near_bound(points: Points, bounds: tuple[float, float]) -> bool:
    """Whether some y has come most of the way to the upper bound."""
    low, high = bounds
    return bool(((points.y - low) / (high - low)).max() > NEAR)


def band(points: Points, fit: Fit, x: np.ndarray) -> np.ndarray:
    """Returns ``[2, n]`` the 95 % bootstrap interval of a fit's value at x ``[n, k]``."""
    value, moved = _resampled(points.x, points.y, fit.bounds)
    lines = _from_scale(_design(x) @ (value[:, None] + moved), fit.bounds)
    limits: np.ndarray = np.quantile(lines, _tails(), axis=1)
    return limits


def _fit(x: np.ndarray, y: np.ndarray, bounds: tuple[float, float] | None = None) -> Fit:
    value, moved = _resampled(x, y, bounds)
    *slopes, intercept = value.tolist()
    residuals = y - _from_scale(_design(x) @ value, bounds)
    spread = float(((y - y.mean()) ** 2).sum())
    return Fit(
        slopes=tuple(slopes),
        intercept=intercept,
        intervals=value[:, None] + np.quantile(moved, _tails(), axis=1).T,
        r_squared=1 - float((residuals**2).sum()) / spread if spread else math.nan,
        rmse=float(np.sqrt((residuals**2).mean())),
        bounds=bounds,
    )


def _resampled(
    x: np.ndarray, y: np.ndarray, bounds: tuple[float, float] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns ``[k + 1]`` coefficients, and ``[k + 1, r]`` how resampled residuals move them."""
    design = _design(x)
    target = _to_scale(y, bounds)
    inverse = linalg.pinv(design)
    value: np.ndarray = inverse @ target
    leverage = np.clip((design * inverse.T).sum(axis=1), 0, 1 - 1e-9)
    residuals = (target - design @ value) / np.sqrt(1 - leverage)
    residuals -= residuals.mean()
    drawn = np.random.default_rng(0).choice(residuals, (_RESAMPLES, len(residuals)))
    return value, inverse @ drawn.T


def _hold_out(points: Points, bounds: tuple[float, float] | None = None) -> Extrapolation:
    kept, out = ~points.largest, points.largest
    fit = _fit(points.x[kept], points.y[kept], bounds)
    design, target = _design(points.x[kept]), _to_scale(points.y[kept], bounds)
    free = len(target) - design.shape[1]
    value = np.array([*fit.slopes, fit.intercept])
    variance = float(((target - design @ value) ** 2).sum()) / free
    place = _design(points.x[out]).mean(axis=0)
    wide = math.sqrt(variance * (1 + place @ linalg.pinv(design.T @ design) @ place))
    middle, reach = float(place @ value), wide * float(stats.t.ppf(1 - _tails()[0], free))
    low, high = _from_scale(np.array([middle - reach, middle + reach]), bounds)
    measured = float(points.y[out].mean())
    next_largest = points.x[kept, 0] == points.x[kept, 0].max()
    return Extrapolation(
        fit=fit,
        predicted=float(fit.predict(points.x[out]).mean()),
        measured=measured,
        interval=(float(low), float(high)),
        flat_error=float(points.y[kept][next_largest].mean()) - measured,
    )


def _tails() -> tuple[float, float]:
    return (1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2


def _design(x: np.ndarray) -> np.ndarray:
    """Returns ``[n, k + 1]``: the logarithms, and a column of ones for the intercept."""
    return np.column_stack([np.log(x), np.ones(len(x))])


def _to_scale(y: np.ndarray, bounds: tuple[float, float] | None) -> np.ndarray:
    if bounds is None:
        return y
    low, high = bounds
    scaled: np.ndarray = special.logit((y - low) / (high - low))
    return scaled


def _from_scale(values: np.ndarray, bounds: tuple[float, float] | None) -> np.ndarray:
    if bounds is None:
        return values
    low, high = bounds
    y: np.ndarray = low + (high - low) * special.expit(values)
    return y
