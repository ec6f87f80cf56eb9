"""A trained reward model's head: P(approved) of a reply from the features a frozen model has of it. Pure.

Knows features and labels of +1 and -1. Ignores tokens, models and where labels come from. With w, b the head, x_i the
features [H] of reply i, y_i in {0, 1} its label and s_j the standard deviation of feature j over the replies:

    p_i = sigmoid(w·x_i + b)          minimise  mean_i -log p(y_i | x_i) + l2/2 · sum_j (s_j w_j)²

This is L2-regularised logistic regression on standardised features (Hastie et al., The Elements of Statistical
Learning, 4.4); the bias is not drawn to zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MARGIN = 0.1
"""|P(approved) - 1/2| below which there is no verdict, where nothing else is said."""
STRENGTHS = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
"""Values of l2 that are tried, the strongest first."""
STEPS = 1000


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    weight: np.ndarray  # f32[H]
    bias: float


def fit(features: np.ndarray, labels: np.ndarray, l2: float) -> Head:
    """The head of features [n, H] and labels [n] of +1 and -1, at the minimum above (it is convex, so there is one).

    A feature that never varies gets no weight. Raises ValueError unless there are labels of both kinds and l2 > 0.
    """
    import torch  # only here: a judge sets the environment of its engine before torch is loaded
    from torch.nn.functional import softplus

    if l2 <= 0 or set(np.unique(labels)) != {-1, 1}:
        raise ValueError(f"l2={l2:g} must be above 0, and labels of both -1 and +1 are needed")
    raw = features.astype(np.float64)
    mean, scale = raw.mean(0), raw.std(0)
    scale = np.where(scale > 1e-9 * (1 + np.abs(mean)), scale, np.inf)  # by which a constant becomes 0
    inputs, signs = torch.from_numpy((raw - mean) / scale), torch.from_numpy(labels.astype(np.float64))
    slope = torch.zeros(inputs.shape[1], dtype=torch.float64, requires_grad=True)
    offset = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [slope, offset], max_iter=STEPS, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = softplus(-signs * (inputs @ slope + offset)).mean() + l2 / 2 * slope.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    weight = slope.detach().numpy() / scale
    return Head(weight.astype(np.float32), float(offset.detach()) - float(weight @ mean))


def probability(head: Head, features: np.ndarray) -> np.ndarray:
    """f64[...]: P(approved) of features [..., H]."""
    score = features.astype(np.float64) @ head.weight.astype(np.float64) + head.bias
    return np.exp(-np.logaddexp(0, -score))


def verdict(probability: float, margin: float) -> int | None:
    """+1 or -1; None, an abstention, where the probability is nearer to 1/2 than `margin`."""
    if abs(probability - 0.5) < margin:
        return None
    return 1 if probability > 0.5 else -1


def choose_l2(features: np.ndarray, labels: np.ndarray, folds: np.ndarray) -> float:
    """The strength under which each fold is best foretold by the others: the least mean log-loss.

    `folds` i64[n] numbers the fold of each row. Where no fold leaves labels of both kinds to the others, the strongest.
    """
    splits = [(folds != fold, folds == fold) for fold in np.unique(folds)]
    splits = [(others, fold) for others, fold in splits if len(np.unique(labels[others])) == 2]

    def loss(l2: float) -> float:
        heads = [fit(features[others], labels[others], l2) for others, _ in splits]
        return sum(_log_loss(head, features[fold], labels[fold]) for head, (_, fold) in zip(heads, splits, strict=True))

    return min(STRENGTHS, key=loss)


def _log_loss(head: Head, features: np.ndarray, labels: np.ndarray) -> float:
    """Summed over the rows, in nats."""
    chance = np.where(labels > 0, probability(head, features), 1 - probability(head, features))
    return float(-np.log(np.maximum(chance, 1e-12)).sum())


def auc(probabilities: np.ndarray, labels: np.ndarray) -> float | None:
    """Chance that an approved reply is held more probable than a refused one, ties half; None without one of each.

    The area under the ROC curve as Mann and Whitney's U (Hanley and McNeil, 1982).
    """
    approved, refused = probabilities[labels > 0], probabilities[labels < 0]
    if not len(approved) or not len(refused):
        return None
    above = (approved[:, None] > refused).mean() + 0.5 * (approved[:, None] == refused).mean()
    return float(above)
