"""First-order terms as pure functions of weights and gradients: identities that hold to rounding."""

import pytest
import torch
from torch import Tensor, nn

from nni_plugin.criteria.first_order import member_gates
from nni_plugin.errors import CriterionError
from nni_plugin.groups import Member, Slice
from nni_plugin.tensors import kind_of

NONE = torch.empty(0, dtype=torch.int64)


def gate_of(layer: nn.Module, path: str, axis: str) -> Tensor:
    holder = nn.ModuleDict({path: layer}) if path else layer
    (gate,) = member_gates(holder, [Member(path, axis, kind_of(layer), NONE, NONE, ())])  # type: ignore[arg-type]
    return gate


def norm_gate(layer: nn.Module, path: str = "") -> Tensor:
    return gate_of(layer, path, "out")


writer_gate = norm_gate


def reader_gate(layer: nn.Module, path: str = "") -> Tensor:
    return gate_of(layer, path, "in")


def parameter_gate(parameter: nn.Parameter, dim: int, path: str = "scale") -> Tensor:
    holder = nn.ParameterDict({path: parameter})
    member = Member(path, "out", "parameter", NONE, NONE, (Slice(path, dim, NONE, NONE),))
    (gate,) = member_gates(holder, [member])
    return gate


def drawn(layer: nn.Module) -> nn.Module:
    for tensor in [*layer.double().parameters(), *layer.buffers()]:
        if tensor.is_floating_point():
            tensor.data.uniform_(0.4, 1.6)
    return layer


def run(*layers: nn.Module, x: Tensor | None = None) -> None:
    """A loss that depends on every output in another way."""
    y = nn.Sequential(*layers)(torch.randn(4, 6, 5, 5, dtype=torch.float64) if x is None else x)
    (y * torch.randn_like(y)).sum().backward()


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def gate_gradient(layers: list[nn.Module], after: int, width: int, x: Tensor) -> Tensor:
    """Gradient of a gate tensor behind layer number `after`, by autograd; leaves the layers' gradients too."""
    z = torch.ones(width, dtype=torch.float64, requires_grad=True)
    for number, layer in enumerate(layers):
        x = layer(x)
        if number == after:
            x = x * z[:, None, None]
    torch.manual_seed(1)
    (x * torch.randn_like(x)).sum().backward()
    assert z.grad is not None
    return z.grad


X = torch.randn(4, 6, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True)])
def test_gate_behind_a_normalisation(norm: nn.Module, train: bool) -> None:
    layers = [drawn(nn.Conv2d(6, 8, 3)), drawn(norm).train(train), nn.Tanh(), drawn(nn.Conv2d(8, 4, 3))]
    norm.zero_grad()
    close(gate_gradient(layers, 1, 8, X), norm_gate(norm))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "layer",
    [
        lambda bias: nn.Conv2d(6, 8, 3, bias=bias),
        lambda bias: nn.Conv2d(6, 8, 3, groups=2, bias=bias),
        lambda bias: nn.Conv2d(6, 8, (1, 3), stride=2, dilation=1, bias=bias),
        lambda bias: nn.ConvTranspose2d(6, 8, 3, bias=bias),
        lambda bias: nn.ConvTranspose2d(6, 8, 3, groups=2, bias=bias),
    ],
    ids=["plain", "grouped", "strided", "transposed", "transposed-grouped"],
)
def test_gate_behind_a_layer_without_normalisation(layer: object, bias: bool) -> None:
    writer = drawn(layer(bias))  # type: ignore[operator]
    layers = [writer, nn.Tanh(), drawn(nn.Conv2d(8, 4, 1))]
    close(gate_gradient(layers, 0, 8, X), writer_gate(writer))


def test_gate_behind_a_depthwise_convolution() -> None:
    writer = drawn(nn.Conv2d(6, 6, 3, groups=6))
    close(gate_gradient([writer, nn.Tanh()], 0, 6, X), writer_gate(writer))


@pytest.mark.parametrize(
    "reader",
    [
        nn.Conv2d(6, 8, 3),
        nn.Conv2d(6, 8, 3, groups=2),
        nn.Conv2d(6, 12, 3, groups=3),
        nn.ConvTranspose2d(6, 8, 3),
        nn.ConvTranspose2d(6, 8, 3, groups=2),
    ],
    ids=["plain", "two-groups", "three-groups", "transposed", "transposed-grouped"],
)
def test_gate_before_a_reader_needs_the_weights_alone(reader: nn.Module) -> None:
    drawn(reader)
    layers = [nn.Identity(), reader, nn.Tanh()]
    close(gate_gradient(layers, 0, 6, X), reader_gate(reader))


def test_gates_of_linear_layers() -> None:
    writer, reader = drawn(nn.Linear(6, 8)), drawn(nn.Linear(8, 5))
    z = torch.ones(8, dtype=torch.float64, requires_grad=True)
    (reader(writer(X.mean((2, 3))) * z).tanh() * torch.arange(5)).sum().backward()
    close(writer_gate(writer), z.grad)  # type: ignore[arg-type]
    close(reader_gate(reader), z.grad)  # type: ignore[arg-type]


def test_scale_invariance_empties_the_weight_form_in_train_mode() -> None:
    conv, norm = drawn(nn.Conv2d(6, 8, 3, bias=False)), drawn(nn.BatchNorm2d(8, eps=1e-14)).train()
    run(conv, norm, nn.Tanh())
    scale = (conv.weight * conv.weight.grad).detach().abs().sum()
    assert float(writer_gate(conv).abs().max()) < 1e-10 * float(scale)
    assert float(norm_gate(norm).abs().min()) > 1e-3


def test_weight_form_in_eval_mode_differs_in_the_shift() -> None:
    conv, norm = drawn(nn.Conv2d(6, 8, 3, bias=False)), drawn(nn.BatchNorm2d(8)).eval()
    run(conv, norm, nn.Tanh())
    deviation = (norm.running_var + norm.eps).sqrt()
    gamma = norm.weight * norm.weight.grad
    expected = (gamma + norm.weight * norm.running_mean / deviation * norm.bias.grad).detach()
    close(writer_gate(conv), expected, 1e-11)


def test_bare_parameter() -> None:
    scale = nn.Parameter(torch.rand(6, 1, 1, dtype=torch.float64))
    z = torch.ones(6, dtype=torch.float64, requires_grad=True)
    (X * (scale * z[:, None, None])).square().sum().backward()
    close(parameter_gate(scale, 0), z.grad)  # type: ignore[arg-type]


def test_what_is_missing_is_named() -> None:
    with pytest.raises(CriterionError, match=r"'stem\.weight' has no gradient"):
        writer_gate(nn.Conv2d(3, 4, 1), "stem")
    with pytest.raises(CriterionError, match="'bn' is a BatchNorm2d without parameters"):
        norm_gate(nn.BatchNorm2d(4, affine=False), "bn")
    conv = nn.Conv2d(6, 8, 3).double()
    conv.bias.requires_grad_(False)
    run(conv)
    with pytest.raises(CriterionError, match=r"'stem\.bias' has no gradient"):
        writer_gate(conv, "stem")
    with pytest.raises(CriterionError, match=r"'scale' has no gradient"):
        parameter_gate(nn.Parameter(torch.ones(3)), 0, "scale")
