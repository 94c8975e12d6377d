"""`tile_triton.py` against `losses/tile.py`, under Triton's interpreter; and built for a GPU, which need not be there.

The interpreter is chosen when triton is imported, so that it runs in a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from unittest import mock

import pytest
import torch

from kd_trainer.kernels.tile_triton import TRITON_DIVERGENCES, has_triton, tile_on_device
from kd_trainer.losses.tile import tile_loss
from kd_trainer.losses.tile_types import Setting

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
each_divergence = pytest.mark.parametrize("divergence", TRITON_DIVERGENCES)
EPS = torch.finfo(torch.float32).eps


# ---- the other processes, and what runs there -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def start():
    """start(**environment) -> an executor of one fresh process in that environment; ended after the module's tests."""
    executors = []

    def begin(**environment):
        executor = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        executors.append(executor)
        with mock.patch.dict(os.environ, environment):
            executor.submit(int).result()  # the process starts with its first task
        return executor

    yield begin
    for executor in executors:
        executor.shutdown()


@pytest.fixture(scope="module")
def interpreter(start):
    executor = start(TRITON_INTERPRET="1")
    executor.submit(round_as_a_gpu_does).result()
    return executor


@pytest.fixture(scope="module")
def compiler(start, tmp_path_factory):
    return start(TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("kernels")))


def round_as_a_gpu_does():
    """To nearest even, where the interpreter cuts a float32 off to make it a bfloat16."""
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(array, source, target, mode):
        if (source.name, target.name) != ("fp32", "bf16"):
            return convert(array, source, target, mode)
        return torch.from_numpy(array.copy()).bfloat16().view(torch.uint16).numpy()

    interpreter._convert_float = rounded


def interpreted(setting, student, teacher, dtypes, weights, labels, gradient, transposed, lanes, times):
    """`tile_on_device` on tiles of wider buffers that hold NaN all round; the student's buffer and the columns."""
    rows, columns = student.shape
    buffers = [torch.full((rows + 2, columns + 5), torch.nan, dtype=getattr(torch, name)) for name in dtypes]
    tiles = [buffer[1:-1, 2:-3] for buffer in buffers]
    for tile, values in zip(tiles, (student, teacher), strict=True):
        tile.copy_(torch.from_numpy(values))
    if transposed:
        tiles[1] = tiles[1].t().contiguous().t()
    weights = torch.from_numpy(weights)
    labels = None if labels is None else torch.tensor(labels)
    columns = tile_on_device(setting, *tiles, weights, labels, gradient=gradient, lanes=lanes, times=times)
    return [x.double().numpy() for x in (buffers[0], *columns)]


def built(divergence, temperature, dtype, hard, gradient, excluding=False):
    """The assembly of what `tile_on_device` would launch on compute capability 9.0, where addresses divide by 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kd_trainer.kernels import tile_triton

    kernel, launch = tile_triton._tile_kernel, mock.MagicMock()
    tiles = [torch.zeros(2, 64, dtype=getattr(torch, dtype)) for _ in range(2)]
    with mock.patch.object(tile_triton, "_tile_kernel", launch), mock.patch.object(torch.version, "cuda", "13.0"):
        setting = Setting(divergence, 0.3, temperature, hard, excluding)
        tile_on_device(setting, *tiles, torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64), gradient=gradient)
    ((values, options),) = launch.__getitem__.return_value.call_args_list
    given = dict(zip(kernel.arg_names, values, strict=False)) | options
    warps = given.pop("num_warps")
    types = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.bool: "*i1"}
    types |= {int: "i32", float: "fp32"}
    signature, constants, divisible = {}, {}, {}
    for name, value in given.items():
        place = (kernel.arg_names.index(name),)
        signature[name] = "constexpr" if name.isupper() else types[getattr(value, "dtype", type(value))]
        if name.isupper():
            constants[place] = value
        elif isinstance(value, torch.Tensor) or value % 16 == 0:
            divisible[place] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, divisible)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm["ptx"]


# ---- comparing -------------------------------------------------------------------------------------------------------


def tiles(rows=3, columns=131, *, spread=3.0, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return tuple((spread * torch.randn(2, rows, columns, generator=generator)).to(dtype))


def run_kernel(
    interpreter, setting, student, teacher, weights, labels, *, gradient=True, transposed=False, lanes=8, times=2
):
    """(tile, soft, hard, same) of `tile_on_device`, in float64; nothing outside the tile was written."""
    arrays = [x.double().numpy() for x in (student, teacher)]
    names = [str(x.dtype).removeprefix("torch.") for x in (student, teacher)]
    labels = None if labels is None else labels.tolist()
    task = (setting, *arrays, names, weights.numpy(), labels, gradient, transposed, lanes, times)
    buffer, *columns = interpreter.submit(interpreted, *task).result()
    tile = torch.from_numpy(buffer[1:-1, 2:-3].copy())
    buffer[1:-1, 2:-3] = float("nan")
    assert torch.from_numpy(buffer).isnan().all()
    return tile, *(torch.from_numpy(x) for x in columns)


def plain(setting, student, teacher, weights, labels, *, gradient=True, dtype=torch.float64):
    tile = student.to(dtype, copy=True)
    columns = tile_loss(setting, tile, teacher.to(dtype), weights.to(dtype), labels, gradient=gradient, compiled=False)
    return tile.double(), *(x.double() for x in columns)


def error(found, expected):
    """Largest difference over largest value."""
    assert found.isfinite().all()
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def check(interpreter, setting, student, teacher, *, weights=None, labels=None, gradient=True, **options):
    """Errors against float64 are as large as those of `losses/tile.py` in float32; half precision is rounded once."""
    rows, columns = student.shape
    weights = torch.rand(rows, 2, generator=torch.Generator().manual_seed(1)) if weights is None else weights
    if labels is None and setting.hard:
        labels = torch.arange(rows) * 7 % columns
        labels[1::3] = -100
    found = run_kernel(interpreter, setting, student, teacher, weights, labels, gradient=gradient, **options)
    exact = plain(setting, student, teacher, weights, labels, gradient=gradient)
    twin = plain(setting, student, teacher, weights, labels, gradient=gradient, dtype=torch.float32)
    for name, one, other, truth in zip(("soft", "hard"), found[1:3], twin[1:3], exact[1:3], strict=True):
        assert error(one, truth) <= 4 * error(other, truth) + 4 * EPS, name
    assert found[3].equal(exact[3])
    if not gradient:
        assert found[0].equal(student.double())
    elif student.dtype == torch.float32:
        assert error(found[0], exact[0]) <= 4 * error(twin[0], exact[0]) + 4 * EPS
    else:
        info = torch.finfo(student.dtype)
        room = exact[0].abs() * info.eps / 2 + 8 * EPS * exact[0].abs().max() + info.smallest_normal * info.eps
        assert ((found[0] - exact[0]).abs() <= room).all()
    return found, exact


# ---- the numbers ---------------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize(
    ("temperature", "hard", "gradient"),
    [(1.0, True, True), (3.0, True, True), (0.7, True, True), (2.5, True, False), (2.5, False, True)],
)
@each_divergence
def test_it_equals_tile_loss(interpreter, divergence, temperature, hard, gradient):
    check(interpreter, Setting(divergence, 0.3, temperature, hard), *tiles(), gradient=gradient)


@needs_triton
@pytest.mark.parametrize(
    ("divergence", "dtype"), [*((name, torch.bfloat16) for name in TRITON_DIVERGENCES), ("jsd", torch.float16)]
)
def test_half_precision_is_rounded_once(interpreter, divergence, dtype):
    check(interpreter, Setting(divergence, 0.6, 2.0, True), *tiles(dtype=dtype))


@needs_triton
@pytest.mark.parametrize("columns", [1, 64, 257])
@pytest.mark.parametrize(("lanes", "times"), [(4, 1), (8, 2), (64, 4)], ids=["16", "64", "1024"])
@pytest.mark.parametrize("divergence", ["symmetric_kl", "jsd"])
def test_blocks_and_rows_of_any_length(interpreter, divergence, columns, lanes, times):
    setting = Setting(divergence, 0.5, 2.0, True)
    check(interpreter, setting, *tiles(2, columns), labels=torch.tensor([columns - 1, 0]), lanes=lanes, times=times)


@needs_triton
def test_a_teacher_of_another_dtype_and_order(interpreter):
    (student, _), (_, teacher) = tiles(dtype=torch.float16), tiles()
    check(interpreter, Setting("forward_kl", 0.5, 2.0, True), student, teacher, transposed=True)


@needs_triton
@pytest.mark.parametrize("divergence", ["symmetric_kl", "skew_reverse_kl"])
@pytest.mark.parametrize("order", ["rising", "falling", "apart"])
def test_maxima_that_rise_in_every_block(interpreter, divergence, order):
    student, teacher = (x.sort(-1).values for x in tiles(columns=67, spread=15.0))
    if order != "rising":
        student = student.flip(-1)
    if order == "falling":
        teacher = teacher.flip(-1)
    check(interpreter, Setting(divergence, 0.5, 2.0, True), student, teacher, lanes=2, times=1)


@needs_triton
@each_divergence
def test_probabilities_of_zero_leave_the_values_finite(interpreter, divergence):
    student, teacher = tiles()
    teacher[:, ::3] -= 300
    student[:, ::2] -= 200
    check(interpreter, Setting(divergence, 0.5, 2.0, True), student, teacher)


@needs_triton
def test_the_label_of_a_confident_student(interpreter):
    """1 - q, which is far smaller than the spacing of bfloat16 at 1."""
    setting, (student, teacher) = Setting("forward_kl", 0.0, 1.0, True), tiles(spread=1.0, dtype=torch.bfloat16)
    student[:, 5] = 14.0
    labels, weights = torch.tensor([5, 5, 5]), torch.tensor([[0.0, 1.0]]).repeat(3, 1)
    found, exact = check(interpreter, setting, student, teacher, weights=weights, labels=labels)
    spacing, at_label = torch.finfo(torch.bfloat16).eps, exact[0][:, 5]
    assert (at_label.abs() < spacing / 4).all()
    assert error(found[0][:, 5] / at_label, torch.ones(3)) <= spacing / 2 + EPS / at_label.abs().min()


@needs_triton
@pytest.mark.parametrize("divergence", ["reverse_kl", "total_variation"])
def test_rows_of_weight_zero_have_values_and_no_gradient(interpreter, divergence):
    setting, weights = Setting(divergence, 0.5, 2.0, True), torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    found, _ = check(interpreter, setting, *tiles(), weights=weights, labels=torch.arange(3))
    assert found[0][0].eq(0).all()
    assert found[0][1:].ne(0).any(-1).all()
    assert found[1].gt(0).all()
    assert found[2].gt(0).all()


@needs_triton
def test_rows_without_a_label_have_no_hard_loss(interpreter):
    for labels in (torch.full((3,), -100), None):
        setting, (student, teacher) = Setting("forward_kl", 0.0, 2.0, True), tiles()
        found = run_kernel(interpreter, setting, student, teacher, torch.ones(3, 2), labels)
        exact = plain(setting, student, teacher, torch.ones(3, 2), labels)
        assert found[2].eq(0).all()
        assert error(found[0], exact[0]) <= 8 * EPS


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
def test_the_top_class_with_ties(interpreter, dtype):
    """Few different logits: several tops in a row, which meet in one class, or in none."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randint(3, (2, 12, 6), generator=generator).to(dtype).repeat_interleave(5, -1)
    found, exact = check(
        interpreter, Setting("forward_kl", 0.0, 1.0, False), student, teacher, gradient=False, lanes=2, times=1
    )
    assert set(exact[3].tolist()) == {0.0, 1.0}
    assert found[3].equal(exact[3])


@needs_triton
def test_tops_that_differ_by_a_rounding(interpreter):
    """Logits so large that sums of both models' would be equal after rounding."""
    student, teacher = torch.zeros(2, 1, 40)
    student[0, 3], student[0, 30] = 50.0, torch.tensor(50.0).nextafter(torch.tensor(51.0))
    teacher[0, 3] = 300.0
    teacher[0, 30] = torch.tensor(300.0).nextafter(torch.tensor(299.0))
    found, _ = check(interpreter, Setting("forward_kl", 0.0, 1.0, False), student, teacher, gradient=False)
    assert found[3].tolist() == [0.0]


# ---- where it runs ---------------------------------------------------------------------------------------------------


# One of each form of the code; the others are compiled by CI.
QUICK = ("forward_kl", "skew_reverse_kl", "total_variation")


@needs_triton
@pytest.mark.parametrize(
    ("divergence", "temperature", "dtype", "hard", "gradient"),
    [
        *(
            pytest.param(name, 2.0, "bfloat16", True, True, marks=[] if name in QUICK else pytest.mark.trains)
            for name in TRITON_DIVERGENCES
        ),
        ("jsd", 0.7, "float32", True, True),
        ("symmetric_kl", 1.0, "bfloat16", False, False),
    ],
)
def test_the_compiler_takes_it(compiler, divergence, temperature, dtype, hard, gradient):
    """Both tiles are prefetched; nothing else synchronises the threads. The interpreter cannot show it."""
    assert_well_built(compiler.submit(built, divergence, temperature, dtype, hard, gradient).result())


@needs_triton
@pytest.mark.parametrize("divergence", ["symmetric_kl", "jsd"])
def test_the_compiler_takes_classes_that_are_excluded(compiler, divergence):
    assert_well_built(compiler.submit(built, divergence, 2.0, "bfloat16", True, True, True).result())


def assert_well_built(ptx):
    assert "cp.async" in ptx
    assert "atom." not in ptx
    assert ".local" not in ptx


@needs_triton
def test_it_is_offered_on_a_gpu_and_in_the_interpreter(interpreter):
    names = ("float32", "bfloat16", "float16", "float64")
    assert [interpreter.submit(offered, name).result() for name in names] == [True, True, True, False]
    assert [offered(name) for name in names] == [False] * 4
    on_gpu = mock.Mock(dtype=torch.bfloat16, device=torch.device("cuda"))
    assert has_triton(on_gpu)


def offered(dtype):
    return has_triton(torch.zeros(1, dtype=getattr(torch, dtype)))


def test_without_triton_it_is_not_offered():
    hide = "import sys; sys.modules['triton'] = None; import torch; "
    hide += "from kd_trainer.kernels.tile_triton import has_triton; "
    like = "type('Like', (), {'dtype': torch.float32, 'device': torch.device('cuda')})"
    subprocess.run([sys.executable, "-c", f"{hide}assert not has_triton({like})"], check=True, timeout=120)
