"""Learns sequences of text tasks with adapters. All orders and seeds of a method are lanes of one program."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cbp_jax import lora
from cbp_jax.experiments import adapter_changes, texts
from cbp_jax.experiments.adapter_methods import AdapterMethod
from cbp_jax.experiments.checks import seeds_of
from cbp_jax.training.lanes import Lanes
from cbp_jax.units.groups import leaves_by_path

_ADAPTER = 3  # random stream of a seed, besides those of `texts`


class Trials:
    """Sequences of tasks. Lanes are orders times seeds; "position" is a task's position in its order."""

    def __init__(self, settings: Any, prepared: texts.Prepared, orders: np.ndarray):
        self.settings, self.prepared, self.orders = settings, prepared, orders
        self.net, self.masks = prepared.net, prepared.class_masks()
        self.places = [(order, seed) for order in range(len(orders)) for seed in seeds_of(settings)]
        self.lanes = Lanes(len(self.places), settings.lanes)
        self.seeds = self.lanes.scatter(jnp.asarray([seed for _, seed in self.places]))
        begin = self._compiled(lambda params, seed: prepared.init(params, seed))
        self.begin = begin(self._share(prepared.params), self.seeds)
        # Compiled functions are shared by methods with the same structure.
        self._fits = functools.cache(self._make_fit)
        self._evaluates = functools.cache(self._make_evaluate)
        self._new_adapter = self._compiled(self._draw)
        self._merge = self._compiled(lambda _, base, adapter: lora.merge(base, adapter))
        self._remember = self._compiled(self._write)
        like = jax.eval_shape(lambda chunk: jax.tree.map(lambda leaf: leaf[0], chunk["encoder"]), self.begin[0])
        self.template = jax.eval_shape(lambda encoder: self._adapter(encoder, 0), like)

    def run(self, method: AdapterMethod) -> Iterator[dict[str, np.ndarray]]:
        """For each position, measurements after it: [orders, seeds, ...]; measures of pairs for each earlier
        position."""
        base, head = (tuple(chunk[part] for chunk in self.begin) for part in ("encoder", "head"))
        fit, evaluate = self._fits(self._form(method)), self._evaluates(method.adapters == "none")
        memory, kept, changes = None, [], []
        numbers = self._share({name: jnp.float32(getattr(method, name)) for name in ("l1", "orthogonality")})
        trained = base if method.adapters == "none" else None
        for position in range(len(self.prepared.tasks)):
            before = trained if method.adapters in ("one", "none") else None
            if trained is None or method.adapters in ("new", "added"):
                trained = self._new_adapter(self._share(position), self.seeds, base)
            if memory is None:  # input directions of earlier adapters, initially 0
                memory = self._empty_memory(trained) if method.orthogonality else self.seeds
            train = self.lanes.scatter(self._stacked(lambda lane: self._train(method, lane, position)))  # noqa: B023
            fitted = fit(numbers, self.seeds, trained, head, base, memory, train)
            trained, head, loss = (tuple(chunk[part] for chunk in fitted) for part in range(3))
            kept.append(trained)
            accuracy = []
            for earlier in range(position + 1):
                asked = lambda lane: self._test(method, lane, earlier, position)  # noqa: B023
                used = kept[earlier] if method.adapters == "new" else trained
                test = self.lanes.scatter(self._stacked(asked))
                accuracy.append(self.lanes.gather(evaluate(self._share(0), used, head, base, test)))
            found = self._changes(method, before, trained)
            yield {
                "loss": self._by_place(self.lanes.gather(loss)),
                "accuracy": self._by_place(np.stack(accuracy, -1)),
                "rank": self._by_place(np.array([change.rank for change in found])),
                "sparsity": self._by_place(np.array([change.sparsity for change in found])),
                "overlap": self._pairs(adapter_changes.overlap_of_subspaces, found, changes),
                "collisions": self._pairs(adapter_changes.collisions, found, changes),
            }
            changes.append(found)
            if method.adapters == "added":
                base = self._merge(self._share(0), base, trained)
            if method.orthogonality:
                memory = self._remember(self._share(position), memory, trained)

    def _compiled(self, function):
        return self.lanes.jit(function)

    def _share(self, tree):
        return self.lanes.share(jax.tree.map(jnp.asarray, tree))

    def _by_place(self, values: np.ndarray) -> np.ndarray:
        """Reshape values of lanes to [orders, seeds, ...]."""
        return values.reshape(len(self.orders), self.settings.seeds, *values.shape[1:])

    def _pairs(self, measure, found, changes) -> np.ndarray:
        rows = [[measure(change, earlier[lane]) for earlier in changes] for lane, change in enumerate(found)]
        return self._by_place(np.array(rows, np.float32).reshape(len(found), len(changes)))

    def _stacked(self, of_lane) -> texts.Batch:
        return jax.tree.map(lambda *arrays: np.stack(arrays), *map(of_lane, range(len(self.places))))

    # What lanes compute.

    @staticmethod
    def _form(method: AdapterMethod) -> tuple[bool, bool, bool, str]:
        return method.adapters == "none", method.l1 > 0, method.orthogonality > 0, method.form

    def _adapter(self, encoder, key, rank=None):
        settings = self.settings
        return lora.init(
            encoder, key, rank=rank or settings.rank, alpha=settings.alpha, target_modules=settings.target_modules
        )

    def _draw(self, position, seed, encoder):
        return self._adapter(encoder, jax.random.fold_in(texts.key_of(seed, _ADAPTER), position))

    def _empty_memory(self, adapter):
        def empty(_, adapter):
            many = len(self.prepared.tasks)
            wide = lambda a: jnp.zeros((*a.shape[:-1], many * a.shape[-1]), a.dtype)
            return adapter.replace(
                factors={path: {**pair, "lora_A": wide(pair["lora_A"])} for path, pair in adapter.factors.items()}
            )

        return self._compiled(empty)(self._share(0), adapter)

    def _write(self, position, memory, adapter):
        """Write the input directions of an adapter into its columns of the memory."""
        factors = {}
        for path, pair in memory.factors.items():
            a = adapter.factors[path]["lora_A"]
            start = [0] * (a.ndim - 1) + [position * a.shape[-1]]
            factors[path] = {**pair, "lora_A": jax.lax.dynamic_update_slice(pair["lora_A"], a, start)}
        return memory.replace(factors=factors)

    def _make_fit(self, form):
        full, sparse, apart, penalty_form = form
        adam = lambda rate: optax.adam(texts.schedule(self.settings, rate))
        body = self.settings.full_learning_rate if full else self.settings.learning_rate
        parts = {"body": adam(body), "head": adam(self.settings.learning_rate)}
        tx = optax.partition(parts, {name: name for name in parts})

        def apply(trained, frozen, batch, key):
            encoder = trained["body"] if full else lora.apply(frozen, trained["body"])
            params = {"params": {"encoder": encoder, "head": trained["head"]}}
            return self.net.apply(params, batch.tokens, batch.mask, batch.types, train=True, rngs={"dropout": key})

        apply = apply if full else lora.factored(apply)

        def fit(numbers, seed, body, head, base, memory, train):
            def penalty(trained):
                found = 0.0
                if sparse:
                    found += numbers["l1"] * lora.l1(trained["body"])
                if apart:
                    found += numbers["orthogonality"] * lora.orthogonality(trained["body"], memory, form=penalty_form)
                return found

            trained, loss = texts.fit(apply, tx, {"body": body, "head": head}, base, train, seed, penalty)
            return trained["body"], trained["head"], loss

        return self._compiled(fit)

    def _make_evaluate(self, full):
        def evaluate(_, body, head, base, test):
            encoder = body if full else lora.merge(base, body)
            return texts.correct(self.net, {"encoder": encoder, "head": head}, test)

        return self._compiled(evaluate)

    # Inputs of lanes.

    def _asked(self, method: AdapterMethod, order: int, task: int, position: int) -> np.ndarray:
        """Return the classes among which a text of a task is classified."""
        if method.head == "own":
            return self.masks[task]
        return self.masks.any(0) if method.joint else self.masks[self.orders[order][: position + 1]].any(0)

    def _train(self, method: AdapterMethod, lane: int, position: int) -> texts.Batch:
        (order, seed), settings = self.places[lane], self.settings
        sequence, size = self.orders[order], settings.batch_size
        old = sequence if method.joint else sequence[:position]
        share = size if method.joint else round(method.replay * size) if position else 0
        counts = [(len(chunk), task) for chunk, task in zip(np.array_split(np.arange(share), max(len(old), 1)), old)]  # noqa: B905
        among = settings.train_texts if method.joint else settings.memory_texts
        parts = [(task, count, among) for count, task in counts if count]
        if share < size:
            parts.insert(0, (sequence[position], size - share, settings.train_texts))
        tasks = self.prepared.tasks
        classes = {tasks[task].name: self._asked(method, order, task, position) for task, _, _ in parts}
        return texts.batches(
            [(tasks[task], count, among) for task, count, among in parts], seed, settings.steps, classes, position
        )

    def _test(self, method: AdapterMethod, lane: int, evaluated: int, position: int) -> texts.Batch:
        order, _ = self.places[lane]
        task = self.orders[order][evaluated]
        size = 4 * self.settings.batch_size
        count = -(-max(len(each.test) for each in self.prepared.tasks) // size)
        return texts.evaluation_batches(
            self.prepared.tasks[task], self._asked(method, order, task, position), size, count
        )

    def _changes(self, method: AdapterMethod, before: Any, after: Any) -> list[adapter_changes.Change]:
        """Return the change by a task for each lane, computed on the host one seed at a time to save memory."""
        after = self.lanes.gather(after)
        before = None if before is None else self.lanes.gather(before)
        of_lane = lambda tree, lane: None if tree is None else jax.tree.map(lambda leaf: leaf[lane], tree)
        settings, found = self.settings, []
        shapes = {path: adapter_changes.matrix_shape(self.template, path) for path in self.template.factors}
        for lane in range(len(self.places)):
            pair = of_lane(after, lane), of_lane(before, lane)
            with np.errstate(invalid="ignore"):  # of lanes that diverged
                if method.adapters == "none":
                    kernels, density = [leaves_by_path(one) for one in pair], settings.collision_density
                    change = adapter_changes.change_of_kernels(*kernels, shapes, settings.rank, density)
                else:
                    change = adapter_changes.change_of_adapter(*pair, settings.collision_density)
            found.append(change)
        return found
