"""Fine-tunes an encoder on each task separately, and finds tickets."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cbp_jax.experiments import texts
from cbp_jax.experiments.checks import seeds_of
from cbp_jax.tickets import Ticket, compare_tickets, dominant_ticket, masked_changes, transplant
from cbp_jax.training.lanes import Lanes
from cbp_jax.transforms import proximal_l1_init

#: Measures of two tickets.
OVERLAPS = ("shared", "by_size", "by_marginals", "jaccard")


class Trials:
    """Fine-tunes task by task, with all seeds as lanes, and measures tickets on the host, seed by seed."""

    def __init__(self, settings: Any, prepared: texts.Prepared):
        self.settings, self.prepared, self.net = settings, prepared, prepared.net
        self.lanes = Lanes(settings.seeds, settings.lanes)
        self.seeds = self.lanes.scatter(jnp.asarray(seeds_of(settings)))
        self.masks = prepared.class_masks()
        self.initial = self.lanes.jit(prepared.init)(self.lanes.share(prepared.params), self.seeds)
        self.starts = self._per_seed(self.lanes.gather(self.initial))
        self._tune = self.lanes.jit(self._tuned)
        self._retrain = self.lanes.jit(self._retrained)
        self._probe = self.lanes.jit(self._probed)
        self._correct = jax.jit(functools.partial(texts.correct, self.net))

    def run(self, strength: float | None) -> Iterator[dict[str, np.ndarray]]:
        """Return measurements of each task, [seeds, ...]; without a strength, for a linear probe of the frozen
        encoder."""
        found: list[list[Ticket | None]] = []
        for number, task in enumerate(self.prepared.tasks):
            train = self.lanes.scatter(self._train_batches(number))
            test = texts.evaluation_batches(task, self.masks[number], *self._test_shape)
            if strength is None:
                accuracy, loss = self.lanes.gather(self._probe(self.lanes.share(test), self.seeds, self.initial, train))
                yield {"accuracy": accuracy, "loss": loss}
                continue
            shared = self.lanes.share(jnp.float32(strength))
            tuned, loss = self.lanes.gather(self._tune(shared, self.seeds, self.initial, train))
            both = zip(self.starts, self._per_seed(tuned), strict=True)
            measured = [self._of_tickets(start, one, test) for start, one in both]
            rows = {name: np.stack([row[name] for row, _ in measured]) for name in measured[0][0]}
            tickets = [ticket for _, ticket in measured]
            pairs = [[_compared(mine, earlier[seed]) for earlier in found] for seed, mine in enumerate(tickets)]
            for name in OVERLAPS:
                values = [[pair[name] for pair in row] for row in pairs]
                rows[name] = np.array(values, np.float32).reshape(len(tickets), len(found))
            if self.settings.retrained:
                rows["retrained_accuracy"] = self._of_retrained(tuned, train, test)
            found.append(tickets)
            yield {"loss": loss, **rows}

    @property
    def _test_shape(self) -> tuple[int, int]:
        size = 4 * self.settings.batch_size
        return size, -(-max(len(task.test) for task in self.prepared.tasks) // size)

    def _train_batches(self, number: int) -> texts.Batch:
        task, settings = self.prepared.tasks[number], self.settings
        classes = {task.name: self.masks[number]}
        parts = [(task, settings.batch_size, settings.train_texts)]
        each = [texts.batches(parts, seed, settings.steps, classes, number) for seed in seeds_of(settings)]
        return jax.tree.map(lambda *arrays: np.stack(arrays), *each)

    def _per_seed(self, tree: Any) -> list[Any]:
        return [jax.tree.map(lambda leaf, row=row: leaf[row], tree) for row in range(self.settings.seeds)]

    def _logits(self, trained, frozen, batch, key):
        del frozen
        return self.net.apply(
            {"params": trained}, batch.tokens, batch.mask, batch.types, train=True, rngs={"dropout": key}
        )

    def _tuned(self, strength, seed, initial, train):
        rate = texts.schedule(self.settings, self.settings.learning_rate)
        pull = optax.masked(proximal_l1_init(strength, rate), {"encoder": True, "head": False})
        tx = optax.chain(optax.adam(rate), pull)
        return texts.fit(self._logits, tx, initial, None, train, seed)

    def _retrained(self, test, seed, initial, train, mask):
        tx = optax.adam(texts.schedule(self.settings, self.settings.learning_rate))
        whole = {"encoder": mask, "head": jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), initial["head"])}
        trained, loss = texts.fit(self._logits, masked_changes(tx, whole, initial), initial, None, train, seed)
        return jnp.where(jnp.isfinite(loss), texts.correct(self.net, trained, test), jnp.nan)

    def _probed(self, test, seed, initial, train):
        """Train a head on the frozen encoder, whose features are computed once."""
        features = jax.lax.map(
            lambda batch: self.net.apply({"params": initial}, batch.tokens, batch.mask, batch.types, method="features"),
            train,
        )
        head = lambda trained, frozen, batch, key: batch.tokens @ trained["kernel"] + trained["bias"]
        tx = optax.adam(texts.schedule(self.settings, self.settings.probe_learning_rate))
        trained, loss = texts.fit(head, tx, initial["head"], None, train._replace(tokens=features), seed)
        return texts.correct(self.net, {**initial, "head": trained}, test), loss

    def _of_tickets(self, start: Any, tuned: Any, test: texts.Batch) -> tuple[dict[str, np.ndarray], Ticket | None]:
        """Return the measurements of one seed, and the ticket to compare. If the seed diverged, only its accuracy is
        measured, and there is no ticket."""
        settings, (before, after) = self.settings, _encoders(start, tuned)
        accuracy = lambda encoder: float(self._correct({"encoder": encoder, "head": tuned["head"]}, test))
        of = lambda ticket: accuracy(transplant(before, after, ticket))
        lines = [dominant_ticket(before, after, dimensions=k, axis=settings.axis) for k in settings.dimensions]
        found = {
            "changed": np.asarray(dominant_ticket(before, after, threshold=0.0).density),
            "ticket_accuracy": np.array([of(dominant_ticket(before, after, keep=d)) for d in settings.densities]),
            "dimension_accuracy": np.array([of(ticket) for ticket in lines]),
            "dimension_density": np.array([ticket.density for ticket in lines]),
        }
        compared = dominant_ticket(before, after, keep=settings.compared)
        if not _is_finite(tuned):
            found, compared = {name: np.full_like(values, np.nan) for name, values in found.items()}, None
        return {"accuracy": np.asarray(accuracy(tuned["encoder"])), **found}, compared

    def _of_retrained(self, tuned: Any, train: Any, test: texts.Batch) -> np.ndarray:
        """Return accuracies [seeds, densities] of tickets trained alone; NaN where one or the other diverged."""
        found = np.full((self.settings.seeds, len(self.settings.densities)), np.nan)
        tuned = self._per_seed(tuned)
        for column, density in enumerate(self.settings.densities):
            if density not in self.settings.retrained:
                continue
            pairs = zip(self.starts, tuned, strict=True)
            masks = [dominant_ticket(*_encoders(start, one), keep=density).mask for start, one in pairs]
            stacked = self.lanes.scatter(jax.tree.map(lambda *leaves: np.stack(leaves), *masks))
            measured = self._retrain(self.lanes.share(test), self.seeds, self.initial, train, stacked)
            found[:, column] = self.lanes.gather(measured)
        found[[not _is_finite(one) for one in tuned]] = np.nan
        return found


def _is_finite(params: Any) -> bool:
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def _encoders(start: Any, tuned: Any) -> tuple[Any, Any]:
    """Return the encoders before and after tuning; without a change if the network diverged, which has no tickets."""
    return start["encoder"], (tuned if _is_finite(tuned) else start)["encoder"]


def _compared(ticket: Ticket | None, other: Ticket | None) -> dict[str, float]:
    if ticket is None or other is None:
        return dict.fromkeys(OVERLAPS, np.nan)
    (found,) = compare_tickets(ticket, other, by=lambda path: "").values()
    return {**found._asdict(), "jaccard": found.jaccard}
