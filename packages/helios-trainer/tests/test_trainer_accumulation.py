"""Gradient accumulation, as the two examples of the quick reference have it."""

import torch


class Steps:
    """Notes the counters at each batch, and steps where the quick reference would."""

    def __init__(self, kit, counter, every):
        self.seen, self.stepped_at, self.kit = [], [], kit
        outer = self

        class Counting(kit.Net):
            def train_step(self, batch, state):
                self._loss_items["loss"] = self.net(batch[0]).mean()

            def on_training_batch_end(self, state, should_log=False):
                outer.seen.append(kit.counters(state)[:3])
                if getattr(state, counter) % every == 0:
                    outer.stepped_at.append(state.global_iteration)

        self.model = Counting()


def test_by_epoch_it_changes_no_count(kit):
    steps = Steps(kit, "current_iteration", 2)
    data = kit.Data(train=10)
    kit.trainer(kit.EPOCH, 5, accumulation_steps=2).fit(steps.model, data)
    # current = global = batches so far; epochs of 10 batches; steps on batches 2, 4, ... 10 of each.
    assert steps.seen == [(i, i, (i - 1) // 10 + 1) for i in range(1, 51)]
    assert steps.stepped_at == list(range(2, 51, 2))


def test_by_iteration_it_multiplies_the_batches(kit):
    num_iterations, accumulation = 20, 2
    steps = Steps(kit, "global_iteration", accumulation)
    trainer = kit.trainer(kit.ITERATION, num_iterations, accumulation_steps=accumulation)
    trainer.fit(steps.model, kit.Data(train=10))
    assert len(steps.seen) == num_iterations * accumulation
    assert steps.seen == [(i // 2, i, (i - 1) // 10 + 1) for i in range(1, 41)]
    assert len(steps.stepped_at) == num_iterations
    # Control: current_iteration, against which the quick reference warns, is another rule.
    wrong = Steps(kit, "current_iteration", accumulation)
    kit.trainer(kit.ITERATION, num_iterations, accumulation_steps=accumulation).fit(
        wrong.model, kit.Data(train=10)
    )
    assert wrong.stepped_at != steps.stepped_at


def test_accumulation_across_an_epochs_end(kit):
    # 3 batches an epoch, 2 to an iteration: the second iteration has a batch of each epoch.
    steps = Steps(kit, "global_iteration", 2)
    kit.trainer(kit.ITERATION, 3, accumulation_steps=2).fit(steps.model, kit.Data(train=3))
    assert steps.seen == [(0, 1, 1), (1, 2, 1), (1, 3, 1), (2, 4, 2), (2, 5, 2), (3, 6, 2)]


def test_it_equals_one_big_batch(kit):
    """Two batches of 2, accumulated, move the weights as one batch of 4 does."""

    class Line(kit.Net):
        def setup(self, fast_init=False):
            self.net = torch.nn.Linear(4, 1)
            self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1)

        def on_training_epoch_end(self, epoch):
            pass

        def train_step(self, batch, state):
            (self.net(batch[0]).square().mean() / self.accumulation).backward()
            if state.global_iteration % self.accumulation == 0:
                self.optimizer.step()
                self.optimizer.zero_grad()

    small, big = Line(accumulation=2), Line()
    kit.trainer(kit.ITERATION, 3, accumulation_steps=2).fit(small, kit.Data(train=6, batch_size=2))
    kit.trainer(kit.ITERATION, 3).fit(big, kit.Data(train=3, batch_size=4))
    assert torch.allclose(small.net.weight, big.net.weight, atol=1e-6)
    control = Line(accumulation=1)
    kit.trainer(kit.ITERATION, 3).fit(control, kit.Data(train=6, batch_size=2))
    assert not torch.allclose(control.net.weight, big.net.weight, atol=1e-6)
