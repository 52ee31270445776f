"""The EMA against its recursion in float64, with bfloat16, sharded and offloaded weights."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from cachetrain.training.ema import Ema
from cachetrain.training.optim import make_optimizer

STEPS = 40


def walk(parameters, ema, decay, steps=STEPS):
    """Moves the parameters at random; returns the averages that the recursion gives, in float64."""
    generator = torch.Generator().manual_seed(0)
    expected = [full(p).double() for p in parameters]
    for step in range(1, steps + 1):
        for number, p in enumerate(parameters):
            with torch.no_grad():
                local(p).add_(torch.randn(local(p).shape, generator=generator))
            decay_t = min(decay, (1 + step) / (10 + step))
            expected[number] = decay_t * expected[number] + (1 - decay_t) * full(p).double()
        ema.update(step)
    return expected


def local(tensor):
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def full(tensor):
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()


def parameters_of(dtype):
    generator = torch.Generator().manual_seed(1)
    shapes = ((3, 5), (7,), (2, 3, 4, 4))
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ema_is_the_warmed_up_average_in_float32(dtype, decay):
    parameters = parameters_of(dtype)
    ema = Ema(parameters, decay)
    expected = walk(parameters, ema, decay)
    assert all(average.dtype == torch.float32 for average in ema.averages)
    torch.testing.assert_close([average.double() for average in ema.averages], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ema_is_in_the_parameters_only_inside_applied(dtype):
    parameters = parameters_of(dtype)
    ema = Ema(parameters, 0.9)
    walk(parameters, ema, 0.9)
    raw = [full(p) for p in parameters]
    pointers = [p.data_ptr() for p in parameters]
    with pytest.raises(KeyError), ema.applied():
        for p, average in zip(parameters, ema.averages, strict=True):
            assert torch.equal(p.detach(), average.to(dtype))
        raise KeyError
    assert all(torch.equal(p.detach(), before) for p, before in zip(parameters, raw, strict=True))
    assert [p.data_ptr() for p in parameters] == pointers


def test_ema_update_never_asks_a_tensor_for_a_value():
    for dtype in (torch.float32, torch.bfloat16):
        parameters = [torch.nn.Parameter(torch.empty(4, 4, dtype=dtype, device="meta"))]
        ema = Ema(parameters, 0.9)  # meta tensors have no values: reading one raises
        ema.update(1)
        assert ema.averages[0].is_meta
        with pytest.raises((RuntimeError, NotImplementedError)):
            ema.averages[0].sum().item()


def test_ema_names_the_averages_of_what_is_trained_as_the_model_does():
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 3))
    model[0].requires_grad_(False)
    ema = Ema([parameter for parameter in model.parameters() if parameter.requires_grad], 0.9)
    named = ema.named(model)
    assert list(named) == ["1.weight", "1.bias"]
    assert named["1.weight"] is ema.averages[0] and named["1.bias"] is ema.averages[1]


def test_ema_of_offloaded_copies_equals_ema_of_the_weights():
    parameters = parameters_of(torch.float32)
    optimizer = make_optimizer("adamw", parameters, 1e-2, (0.9, 0.99), 0.01, cpu_offload=True)
    from_copies = Ema(parameters, 0.9, device="cpu", sources=optimizer.cpu_parameters)
    from_weights = Ema(parameters, 0.9)
    start = from_weights.averages[0].clone()
    for step in range(1, 6):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        from_copies.update(step)
        from_weights.update(step)
    assert all(map(torch.equal, from_copies.averages, from_weights.averages))
    assert not torch.equal(from_copies.averages[0], start)


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_ema_of_fully_sharded_weights(mesh):
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 3))
    fully_shard(model, mesh=mesh)
    parameters = list(model.parameters())
    assert all(isinstance(p, DTensor) for p in parameters)
    ema = Ema(parameters, 0.9)
    expected = walk(parameters, ema, 0.9)
    named = ema.named(model)
    assert list(named) == [name for name, _ in model.named_parameters()]
    torch.testing.assert_close([full(a).double() for a in named.values()], expected, rtol=1e-5, atol=1e-5)

    raw = [full(p) for p in parameters]
    with ema.applied():
        assert all(map(torch.equal, map(full, parameters), map(full, ema.averages)))
        model(torch.ones(1, 4))
    assert all(map(torch.equal, map(full, parameters), raw))
