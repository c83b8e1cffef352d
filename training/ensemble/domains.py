"""A threshold for slides that nobody has seen: chosen over whole domains, and judged with each domain left out.

A threshold that maximises balanced accuracy over all crops serves the commonest domain. Here every domain counts once:
"worst" maximises the lowest balanced accuracy of any domain, "mean" the average over domains. Each is averaged over
resampled groups (slides), so that no slide moves it far. `export --threshold` chooses between these and all crops.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from inference.errors import UserError
from inference.metrics import balanced_accuracy, best_threshold, group_bootstrap

RULES = ("mean", "worst")
CUTS = 400  # that are tried, between the lowest and the highest logit
RESAMPLES = 100


@dataclass(frozen=True)
class DomainLogits:
    """Crops with the logit of the mean that answers; all fields (N,). Every domain has crops of both classes."""

    logits: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    domains: np.ndarray

    def part(self, chosen: np.ndarray) -> DomainLogits:
        """The crops that `chosen` (N,) selects, by index or as a mask."""
        return DomainLogits(self.logits[chosen], self.labels[chosen], self.groups[chosen], self.domains[chosen])

    def joined(self, other: DomainLogits) -> DomainLogits:
        """These crops, then the other ones."""
        return DomainLogits(
            np.concatenate([self.logits, other.logits]),
            np.concatenate([self.labels, other.labels]),
            np.concatenate([self.groups, other.groups]),
            np.concatenate([self.domains, other.domains]),
        )


@dataclass(frozen=True)
class LeftOutDomain:
    """A domain scored with the cut of all others.

    accuracy, shipped, best: balanced accuracy with that cut, with the cut of all domains, and with its own best one
    """

    domain: str
    crops: int
    atypical: int
    cut: float
    accuracy: float
    shipped: float
    best: float


def accuracies(scored: DomainLogits, cuts: np.ndarray) -> np.ndarray:
    """Balanced accuracy of each domain with both classes at each cut (D, C)."""
    rows = []
    for domain in np.unique(scored.domains):
        chosen = scored.domains == domain
        labels, logits = scored.labels[chosen], scored.logits[chosen]
        atypical, normal = np.sort(logits[labels == 1]), np.sort(logits[labels == 0])
        if len(atypical) and len(normal):
            sensitivity = 1 - np.searchsorted(atypical, cuts) / len(atypical)
            rows.append((sensitivity + np.searchsorted(normal, cuts) / len(normal)) / 2)
    return np.array(rows)


def best_cut(scored: DomainLogits, rule: str) -> float:
    """The cut of the logit that serves the domains best by `rule`, one of RULES; NaN where none has both classes."""
    cuts = np.linspace(scored.logits.min(), scored.logits.max(), CUTS)
    by_domain = accuracies(scored, cuts)
    if not len(by_domain):
        return float("nan")
    value = by_domain.min(0) if rule == "worst" else by_domain.mean(0)
    return float(cuts[np.flatnonzero(value == value.max())].mean())


def resampled_cuts(scored: DomainLogits, rule: str) -> np.ndarray:
    """`best_cut` of each resample of the groups (R,)."""
    cuts = np.array([best_cut(scored.part(index), rule) for index in group_bootstrap(scored.groups, RESAMPLES)])
    return cuts[np.isfinite(cuts)]


def cut_for_unseen(scored: DomainLogits, rule: str) -> float:
    """The cut of the logit that serves the domains best by `rule`, and that no group moves far."""
    return float(resampled_cuts(scored, rule).mean())


def leave_domains_out(scored: DomainLogits, rule: str) -> list[LeftOutDomain]:
    """Each domain that has both classes with the cut that the others give: what a new domain may expect."""
    rows, of_all = [], cut_for_unseen(scored, rule)
    for domain in np.unique(scored.domains).tolist():
        left = scored.domains == domain
        own, others = scored.part(left), scored.part(~left)
        if len(np.unique(own.labels)) == 2:
            cut = cut_for_unseen(others, rule)
            accuracy, shipped = (balanced_accuracy(own.labels, own.logits >= each) for each in (cut, of_all))
            best = best_threshold(own.labels, own.logits)[1]
            rows.append(LeftOutDomain(domain, len(own.labels), int(own.labels.sum()), cut, accuracy, shipped, best))
    return rows


def check_domains(labels: np.ndarray, domains: np.ndarray) -> None:
    """UserError where fewer than two domains have crops of both classes; labels, domains (N,)."""
    both = [name for name in np.unique(domains).tolist() if len(np.unique(labels[domains == name])) == 2]
    if len(both) < 2:
        raise UserError(
            f"{len(both)} domains of the training data have crops of both classes; expected two or more for a "
            "threshold by domain; take --threshold crops"
        )
