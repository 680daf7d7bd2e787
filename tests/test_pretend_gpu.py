"""The pretend GPU counts the synchronisations, launches and bytes of a real GPU. Other tests rely on these counts."""

import pytest
import torch
from pretend_gpu import OnGPU, PretendGPU

WAITS = {
    "item": lambda x, host: x.sum().item(),
    "bool": lambda x, host: bool(x.sum() > 0),
    "tolist": lambda x, host: x.tolist(),
    "cpu": lambda x, host: x.cpu(),
    "to the host": lambda x, host: x.to("cpu"),
    "nonzero": lambda x, host: x.nonzero(),
    "a mask": lambda x, host: x[x > 0],
    "storing by a mask of unknown size": lambda x, host: x.masked_select(x > 0),
    "bincount": lambda x, host: torch.bincount(x.long().abs()),
    "repeats of unknown sum": lambda x, host: x.repeat_interleave(x.long().abs()),
    "a list": lambda x, host: torch.tensor([1.0, 2.0], device=x.device),
    "pageable memory": lambda x, host: host.to(x.device),
    "pageable memory, unblocked": lambda x, host: host.to(x.device, non_blocking=True),
    "pinned memory, blocked": lambda x, host: host.pin_memory().to(x.device),
    "the host's indices": lambda x, host: x[host.long().abs()],
    "a copy in place": lambda x, host: x.copy_(host),
}
FREE = {
    "arithmetic": lambda x, host: (x * 2 + 1).sum(),
    "a number": lambda x, host: torch.where(x > 0, x, 0.0),
    "pinned memory, unblocked": lambda x, host: host.pin_memory().to(x.device, non_blocking=True),
    "repeats of known sum": lambda x, host: x.repeat_interleave(torch.ones_like(x).long(), output_size=5),
    "sort": lambda x, host: x.sort(stable=True),
    "indices": lambda x, host: x[x.argsort()],
    "making": lambda x, host: torch.zeros(3, device=x.device) + torch.arange(3, device=x.device),
    "a view": lambda x, host: x[1:].unsqueeze(0),
}


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_is_counted_once(name):
    with PretendGPU() as gpu:
        x = gpu.tensor(torch.arange(5.0) - 2)
        WAITS[name](x, torch.arange(5.0))
        assert len(gpu.syncs) == 1, gpu.syncs


@pytest.mark.parametrize("name", FREE)
def test_what_does_not_wait_is_not(name):
    with PretendGPU() as gpu:
        out = FREE[name](gpu.tensor(torch.arange(5.0) - 2), torch.arange(5.0))
        assert gpu.syncs == []
        assert all(isinstance(value, OnGPU) for value in (out if isinstance(out, tuple) else (out,)))


def test_launches_and_bytes_are_those_of_kernels():
    with PretendGPU() as gpu:
        x = gpu.tensor(torch.ones(10, 4))
        half = x[:5].t().detach()  # views
        room = torch.empty(4, 5, device=x.device)
        assert (gpu.launches, gpu.bytes) == ([], 0)
        torch.mul(half, 2.0, out=room)
        assert gpu.bytes_of == {"mul": 2 * 80}
        room.mul_(2.0)
        x.to(torch.bfloat16)
        torch.zeros(6, device=x.device)
        x[torch.tensor([1]).pin_memory().to(x.device, non_blocking=True)]
        torch.empty(0, 4, device=x.device).zero_()
        assert gpu.bytes_of == {"mul": 160, "mul_": 160, "_to_copy": 240, "zeros": 24, "index": 2 * 16 + 8}
        assert gpu.launches == ["mul", "mul_", "_to_copy", "zeros", "index"]
        gpu.reset()
        torch.mm(half, x[:5], out=torch.empty(4, 8, device=x.device)[:, :4])
        assert gpu.bytes == 0
        ((name, operands),) = gpu.products
        assert name == "mm"
        assert {(o.shape, o.stride) for o in operands} == {((4, 5), (1, 4)), ((5, 4), (4, 1)), ((4, 4), (8, 1))}


def test_gradients_pass_and_the_cpu_is_refused():
    with PretendGPU() as gpu:
        x = gpu.tensor(torch.arange(3.0)).requires_grad_()
        (x.double() * x).sum().backward()
        assert isinstance(x.grad, OnGPU)
        assert gpu.syncs == []
        assert x.grad.tolist() == [0.0, 2.0, 4.0]
        with pytest.raises(RuntimeError, match="found one on the CPU"):
            x + torch.ones(3)


def test_an_allocation_beyond_the_card_fails():
    with PretendGPU(largest=100) as gpu:
        torch.empty(25, device="cuda")
        with pytest.raises(torch.cuda.OutOfMemoryError):
            torch.zeros(26, device="cuda")
        assert gpu.allocated == [100]
