"""What many models do in a line or two over torch. Nothing else in the trainer needs it."""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from helios.trainer._layout import is_dtensor
from helios.trainer._parts import load_parts, save_parts
from helios.trainer._replicas import Strategy, replicate, shard, without_exchange


class ModelHelpers:
    """Optional helpers of Model."""

    trainer: Any
    device: torch.device
    is_distributed: bool

    def distribute(
        self,
        net: nn.Module,
        *,
        blocks: Iterable[nn.Module] = (),
        fsdp: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> nn.Module:
        """Return a network on the device of the run, on all ranks if there are several, as the trainer's strategy says.

        Call it in `setup`, before the optimizer is made. With `Strategy.DDP` gradients are summed in the same order in
        every process, which DistributedDataParallel alone does not do: with three ranks or more, a run that starts
        again would differ. An `nn.Embedding` with `sparse=True`, or the option `static_graph`, leaves it as it is.

        Args:
            net: the network, on any device, with the same parameters on every rank.
            blocks: with `Strategy.FSDP`, the parts of the network that are gathered one at a time, such as the layers
                of a transformer; without any, the whole network is.
            fsdp: with `Strategy.FSDP`, options for `torch.distributed.fsdp.fully_shard`.
            **options: with `Strategy.DDP`, options for DistributedDataParallel, such as `find_unused_parameters=True`
                if some parameters have no part in some batches.

        Returns:
            The network itself, moved, in one process; a DistributedDataParallel of it; or itself, sharded.
        """
        net = net.to(self.device)
        if not self.is_distributed:
            return net
        if self.trainer is not None and self.trainer.settings.strategy is Strategy.FSDP:
            return shard(net, blocks, self.device, dict(fsdp or {}))
        return replicate(net, self.device, options)

    def exchange_gradients(self, *networks: nn.Module, when: bool) -> AbstractContextManager[None]:
        """Return a context for the forward and backward passes of a batch, after which ranks exchange gradients or not.

        With accumulation only the batch before the optimizer's step need exchange them:
        `with self.exchange_gradients(self.net, when=state.global_iteration % self.num_accumulated == 0): ...`.
        A checkpoint in between has the gradients of every rank. Networks in shards exchange them always: each rank has
        room for its part of them only.

        Args:
            *networks: what `distribute` returned; others are as ever.
            when: whether this batch exchanges them.
        """
        return nullcontext() if when else without_exchange(networks)

    def autocast(self, dtype: torch.dtype = torch.bfloat16, enabled: bool = True) -> torch.autocast:
        """Return a context in which torch computes in `dtype` what it can, on the device of the run.

        Args:
            dtype: bfloat16 needs nothing more; float16 needs a `torch.amp.GradScaler`, whose state you save.
            enabled: False gives a context that changes nothing.
        """
        return torch.autocast(self.device.type, dtype=dtype, enabled=enabled)

    def clip_gradients(
        self,
        parameters_or_network: nn.Module | torch.Tensor | Iterable[torch.Tensor],
        max_norm: float,
        norm_type: float = 2.0,
    ) -> torch.Tensor:
        """Scale gradients down so that their norm, over all of them together, is at most `max_norm`.

        Call it between `backward` and `step`; with accumulation only where the step follows. A norm that is not
        finite raises nothing: it is in what is returned, and in the gradients.

        Args:
            parameters_or_network: whose gradients; of a network all parameters.
            max_norm: the largest norm to leave.
            norm_type: which norm; `math.inf` is the largest absolute value.

        Returns:
            The norm before, without dimensions, on the device of the gradients: nothing waits for it. Of a network in
            shards, the norm over all ranks.
        """
        parameters = parameters_or_network
        if isinstance(parameters, nn.Module):
            parameters = parameters.parameters()
        norm = nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)
        return norm.full_tensor() if is_dtensor(norm) else norm

    def save_all(self, *, omit: Iterable[str] = (), **parts: Any) -> dict[str, Any]:
        """Return the state of the parts by name, for `state_dict`, and complain of a part that was forgotten.

        A part that has a `state_dict` is asked for it, and so are those in lists, tuples and dicts; of
        DistributedDataParallel the network inside is. Everything else (numbers, tensors, ...) is kept as it is.

        Looked at are the attributes of the model, also in lists, tuples and dicts: whatever has both `state_dict`
        and `load_state_dict` must be given or omitted, but for networks without state or all of whose tensors
        belong to networks that are given. A number or a tensor of your own cannot be told from a setting: give
        those that must be saved.

        Args:
            omit: names of attributes whose state need not be saved, such as `"teacher"` or `"nets.1"`.
            **parts: what to save, under these names.

        Returns:
            The states, and under `"_parts"` the names of those that are not just values.

        Raises:
            TypeError: `omit` is a str or holds something else, or a list of parts has one without state.
            ValueError: a part was forgotten, `omit` names nothing, or a part is called `_parts`.
        """
        return save_parts(vars(self), parts, omit)

    def load_all(self, state: Mapping[str, Any], /, **parts: Any) -> dict[str, Any]:
        """Give each part its state, for `load_state_dict`, strictly, and return the values.

        Checked before anything is changed: that every part has a state and every state a part, the names and shapes
        in networks, the numbers of parameters in the groups of optimizers.
        `self.best = self.load_all(state, net=self.net)["best"]` loads a network and a number.

        Args:
            state: what `save_all` returned. One that was written by hand will do too: in it, every dict must be
                of a part.
            **parts: as given to `save_all`; values may be left out.

        Returns:
            What has no state of its own, by name.

        Raises:
            ValueError: parts and states do not fit together; all that does not is named, and nothing is loaded.
            Exception: what a part's own `load_state_dict` raised; the parts before it are loaded already.
        """
        return load_parts(state, parts)
