"""A rank of test_two_ranks_update_their_shards: FSDP2's shards against whole weights, some of them of one row."""

from __future__ import annotations

import torch
from test_fused_optimizers import ONE_EACH, STEPS, give_gradients, network
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def main() -> None:
    distributed.init_process_group("gloo")
    for ours, theirs, more in ONE_EACH:
        sharded, whole = network(), network()
        sharded.append(torch.nn.Linear(3, 1, bias=False, dtype=torch.float64))  # nothing for the second rank
        whole.append(torch.nn.Linear(3, 1, bias=False, dtype=torch.float64))
        whole.load_state_dict(sharded.state_dict())
        fully_shard(sharded)
        own = ours(sharded.parameters(), lr=0.1, **more)
        other = theirs(whole.parameters(), lr=0.1, **more)
        assert not own._step_supports_amp_scaling
        for step in range(STEPS):
            give_gradients(whole, step)
            for mine, weight in zip(sharded.parameters(), whole.parameters(), strict=True):
                assert isinstance(mine, DTensor)
                if weight.grad is not None:
                    mine.grad = distribute_tensor(weight.grad, mine.device_mesh, mine.placements)
            own.step()
            other.step()
        for mine, weight in zip(sharded.parameters(), whole.parameters(), strict=True):
            assert isinstance(mine, DTensor)
            torch.testing.assert_close(mine.full_tensor(), weight, rtol=1e-14, atol=1e-14)
            for key, value in own.state[mine].items():
                assert key == "step" or isinstance(value, DTensor), key
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
