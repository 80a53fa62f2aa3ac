"""Traffic, FLOPs and network of small programs compiled for TPUs, whose costs are known; and bounds from them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from markers import libtpu

from emu3_jax.errors import Emu3Error
from emu3_jax.sharding import bounds, plan
from emu3_jax.sharding.chips import CHIPS
from emu3_jax.sharding.collectives import Collective, collectives, sent
from emu3_jax.sharding.costs import Costs, count
from emu3_jax.sharding.hlo import Program
from emu3_jax.sharding.mesh import make_mesh

KIB, MIB = 2**10, 2**20


@functools.cache
def chips():
    return plan.tpu_slice("v5e:2x2").devices


def counted(function, *shapes, dtype=jnp.bfloat16, donate=()):
    """Costs of a function on one chip of v5e."""
    place = jax.sharding.SingleDeviceSharding(chips()[0])
    arguments = [jax.ShapeDtypeStruct(shape, dtype if shape else jnp.int32, sharding=place) for shape in shapes]
    return count(plan.compile_ahead(jax.jit(function, donate_argnums=donate).lower(*arguments)).as_text())


@libtpu
def test_a_product_reads_its_sides_and_writes_its_result():
    costs, step = counted(jnp.matmul, (8192, 4096), (4096, 16384))
    assert step is None and costs.flops == 2 * 8192 * 4096 * 16384 and costs.integer_ops == 0
    assert costs.read == 2 * (8192 * 4096 + 4096 * 16384) and costs.written == 2 * 8192 * 16384


@libtpu
def test_products_of_integers_are_counted_apart():
    multiply = functools.partial(jnp.matmul, preferred_element_type=jnp.int32)
    costs, _ = counted(multiply, (256, 512), (512, 128), dtype=jnp.int8)
    assert costs.integer_ops == 2 * 256 * 512 * 128 and costs.flops == 0


@libtpu
@pytest.mark.parametrize("precision, passes", [("default", 1), ("high", 3), ("highest", 6)])
def test_exact_products_are_several_of_bfloat16(precision, passes):
    multiply = functools.partial(jnp.matmul, precision=precision)
    costs, _ = counted(multiply, (256, 512), (512, 128), dtype=jnp.float32)
    assert costs.flops == passes * 2 * 256 * 512 * 128


@libtpu
@pytest.mark.parametrize("batch, rows, inner, columns", [(16, 4, 128, 256), (3, 8, 64, 512)])
def test_products_of_batches_do_not_count_padding(batch, rows, inner, columns):
    """XLA writes them as convolutions with one spatial axis per axis of the batch."""
    costs, _ = counted(jnp.matmul, (batch, rows, inner), (batch, inner, columns))
    assert costs.flops == 2 * batch * rows * inner * columns


@libtpu
def test_a_scan_reads_each_layer_once():
    """The loop runs 12 times, and each time slices one layer from the stack."""
    layers, width = 12, 4096

    def scan(x, weights):
        return jax.lax.scan(lambda x, weight: (jnp.tanh(x @ weight), None), x, weights)[0]

    costs, step = counted(scan, (8, width), (layers, width, width))
    assert step is None and costs.flops == layers * 2 * 8 * width * width
    stack = layers * 2 * width * width
    assert stack <= costs.read < stack + MIB and costs.written < MIB


@libtpu
def test_an_update_in_place_moves_what_it_updates():
    """A cache of 64 MiB that gets one slot: nothing copies it if it is donated."""

    def put(cache, new, slot):
        return jax.lax.dynamic_update_slice(cache, new * 2, (0, slot, 0))

    shapes = ((16, 16384, 128), (16, 1, 128), ())
    costs, _ = counted(put, *shapes, donate=(0,))
    assert costs.read < 64 * KIB and costs.written < 64 * KIB
    costs, _ = counted(put, *shapes)
    assert costs.read >= 64 * MIB and costs.written >= 64 * MIB


@libtpu
def test_steps_of_an_endless_loop_are_counted_apart():
    """A step reads weights that do not fit into the memory on the chip, and what leads to the loop is apart."""
    width = 16384

    def loop(x, weight):
        def step(state):
            x, total = state
            return jnp.tanh(x @ weight), total + 1

        return jax.lax.while_loop(lambda state: state[0][0, 0] > state[1], step, (x, jnp.bfloat16(0)))[0]

    costs, step = counted(loop, (8, width), (width, width))
    assert step.flops == 2 * 8 * width * width and costs.flops == 0
    assert 2 * width * width <= step.read < 2 * width * width + 2 * MIB and step.written < MIB
    assert costs.read < 2 * MIB


@libtpu
def test_of_branches_the_cheapest_counts():
    def choose(x, weight, which):
        return jax.lax.cond(which > 0, lambda: x @ weight, lambda: x * 2)

    costs, _ = counted(choose, (8, 4096), (4096, 4096), ())
    assert costs.flops == 0 and costs.read < MIB


@libtpu
@pytest.mark.parametrize("slices", [2, 4])
def test_exchanges_between_slices(slices):
    """XLA hands them to the runtime. Here each device holds the whole sum and the whole of its columns."""
    found = plan.tpu_slice("v5e:2x2", count=slices)
    mesh = make_mesh(f"data={slices},fsdp=4", found.devices)
    assert [{d.slice_index for d in part.flat} for part in mesh.devices] == [{number} for number in range(slices)]

    def shapes(*specs):
        return [NamedSharding(mesh, PartitionSpec(*spec)) for spec in specs]

    def kinds(function, inputs, out):
        arguments = [jax.ShapeDtypeStruct((1024, 1024), jnp.float32, sharding=sharding) for sharding in shapes(*inputs)]
        compiled = plan.compile_ahead(jax.jit(function, out_shardings=shapes(out)[0]).lower(*arguments))
        costs, _ = count(compiled.as_text())
        return {each.kind: each for each in costs.collectives}

    gathered = kinds(lambda x: x * 2, [("data", "fsdp")], (None, "fsdp"))["all-gather"]
    # Each device gets the other slices' rows of its columns.
    assert gathered.count == 1 and gathered.ici_bytes == 0 and gathered.dcn_bytes == MIB * (slices - 1) // slices
    product = kinds(jnp.matmul, [(None, "data"), ("data", None)], (None, None))["all-reduce"]
    assert product.dcn_bytes == 2 * 4 * MIB * (slices - 1) // slices


@libtpu
@pytest.mark.parametrize("sizes", ["data=1,fsdp=8", "fsdp=-1", "tensor=8"])
def test_only_data_spans_slices(sizes):
    devices = plan.tpu_slice("v5e:2x2", count=2).devices
    with pytest.raises(Emu3Error, match="has data=1 for 2 slices: only data may span slices, so it must be a multiple"):
        make_mesh(sizes, devices)


def exchanged(function, shape, slices=(), out=None):
    mesh = Mesh(chips(), ("x",))
    place = NamedSharding(mesh, PartitionSpec("x"))
    local = jax.shard_map(
        function, mesh=mesh, in_specs=PartitionSpec("x"), out_specs=out or PartitionSpec(), check_vma=False
    )
    lowered = jax.jit(local).lower(jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place))
    return collectives(plan.compile_ahead(lowered).as_text(), slices)[0]


@libtpu
@pytest.mark.parametrize("kind", ["all-reduce", "all-gather", "all-to-all"])
def test_what_chips_send_each_other(kind):
    size = 4 * 512 * 1024
    function, out = {
        "all-reduce": (lambda x: jax.lax.psum(x, "x"), None),
        "all-gather": (lambda x: jax.lax.all_gather(x, "x", tiled=True), None),
        "all-to-all": (lambda x: jax.lax.all_to_all(x, "x", 0, 1, tiled=True), PartitionSpec("x")),
    }[kind]
    rows = 512 if kind == "all-gather" else 4 * 512
    found = exchanged(function, (rows, 1024), out=out)
    total = {"all-reduce": 2 * 3 / 4 * size, "all-gather": 3 / 4 * size, "all-to-all": 3 / 4 * size}[kind]
    assert found == [Collective(kind, 1, size, round(total), 0)]


@libtpu
def test_groups_that_span_slices_use_the_network_between_them():
    """The same program, told that its four chips are two slices of two."""
    function = functools.partial(jax.lax.all_gather, axis_name="x", tiled=True)
    size = 4 * 512 * 1024
    (found,) = exchanged(function, (512, 1024), slices=(0, 0, 1, 1))
    assert (found.bytes, found.ici_bytes, found.dcn_bytes) == (size, size // 2, size // 4)


def test_the_least_that_a_device_sends():
    groups = [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert sent("all-reduce", 800, groups) == (2 * 600, 0)
    assert sent("reduce-scatter", 800, groups) == (600, 0)
    assert sent("all-gather", 800, [[0]]) == (0, 0)
    two = (0, 1, 0, 1, 0, 1, 0, 1)
    assert sent("all-reduce", 800, groups, two) == (2 * 400, 2 * 200)
    assert sent("all-to-all", 800, groups, two) == (200, 400)
    assert sent("collective-permute", 800, [[0, 2], [2, 0]], two) == (800, 0)
    assert sent("collective-permute", 800, [[0, 1], [1, 0]], two) == (0, 800)


CHAIN = """HloModule jit_step, num_partitions=8

%start (p: f32[4]) -> (f32[4], f32[32]) {
  %p = f32[4]{0:T(128)} parameter(0)
  %all-gather.1 = f32[32]{0:T(128)} all-gather(%p), channel_id=1, replica_groups=mesh['a'=4,'b'=2] {'b','a':(2)2}, \
dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %c = (f32[4]{0:T(128)}, f32[32]{0:T(128)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%go (q: f32[4], r: f32[32], s: f32[1024]) -> (f32[4], f32[32], f32[1024]) {
  %q = f32[4]{0:T(128)} parameter(0)
  %r = f32[32]{0:T(128)} parameter(1)
  %s = f32[1024]{0:T(128)} parameter(2)
  %all-gather.2 = f32[32]{0:T(128)} all-gather(%q), channel_id=1, replica_groups=mesh['a'=4,'b'=2] {'b','a':(2)2}, \
dimensions={0}, frontend_attributes={chain_id="0"}
  %n = f32[1024]{0:T(128)} negate(%s)
  ROOT %t = (f32[4]{0:T(128)}, f32[32]{0:T(128)}, f32[1024]{0:T(128)}) tuple(%q, %all-gather.2, %n)
}

ENTRY %main (x: f32[4], y: f32[1024]) -> f32[1024] {
  %x = f32[4]{0:T(128)} parameter(0)
  %y = f32[1024]{0:T(128)} parameter(1)
  %f = (f32[4]{0:T(128)}, f32[32]{0:T(128)}) fusion(%x), kind=kCustom, calls=%start
  %a = f32[4]{0:T(128)} get-tuple-element(%f), index=0
  %b = f32[32]{0:T(128)} get-tuple-element(%f), index=1
  %g = (f32[4]{0:T(128)}, f32[32]{0:T(128)}, f32[1024]{0:T(128)S(1)}) fusion(%a, %b, %y), kind=kOutput, calls=%go
  ROOT %h = f32[1024]{0:T(128)S(1)} get-tuple-element(%g), index=2
}
"""


def test_a_collective_that_several_fusions_advance_counts_once():
    """Its group: axis b and the second half of axis a, so four devices. The fusion's result is not in HBM."""
    costs, step = count(CHAIN)
    assert step is None and costs.collectives == (Collective("all-gather", 1, 128, 96, 0),)
    assert (costs.read, costs.written) == (4 * 4 + 4 * 1024, 4 * 32)
    assert Program(CHAIN).partitions == 8


SCATTER = """HloModule jit_step, num_partitions=4

%all-reduce-scatter (input: f32[32]) -> f32[8] {
  %input = f32[32]{0:T(128)} parameter(0)
  %all-reduce.1 = f32[32]{0:T(128)} all-reduce(%input), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  %table = u32[4]{0:T(128)} constant({0,1,2,3})
  %partition-id = u32[]{:T(128)} partition-id()
  ROOT %part = f32[8]{0:T(128)} dynamic-slice(%all-reduce.1, %partition-id), dynamic_slice_sizes={8}
}

ENTRY %main (x: f32[32]) -> f32[32] {
  %x = f32[32]{0:T(128)} parameter(0)
  %f = f32[8]{0:T(128)} fusion(%x), kind=kCustom, calls=%all-reduce-scatter
  ROOT %all-reduce.2 = f32[32]{0:T(128)} all-reduce(%x), channel_id=2, replica_groups={{0,1,2,3}}, to_apply=%add
}
"""


def test_a_fusion_that_slices_an_all_reduce_scatters():
    """Of 128 bytes, a device sends three quarters once. The second all-reduce sends them twice."""
    costs, _ = count(SCATTER)
    assert costs.collectives == (
        Collective("all-reduce", 1, 128, 2 * 96, 0),
        Collective("reduce-scatter", 1, 128, 96, 0),
    )


LOOP = """HloModule jit_step

%body (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %state = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %n = s32[]{:T(128)} get-tuple-element(%state), index=0
  %x = f32[8]{0:T(128)} get-tuple-element(%state), index=1
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%n, %two)
  %y = f32[8]{0:T(128)} negate(%x)
  ROOT %t = (s32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%next, %y)
}

%condition (old: (s32[], f32[8])) -> pred[] {
  %old = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %m = s32[]{:T(128)} get-tuple-element(%old), index=0
  %limit = s32[]{:T(128)} constant(8)
  ROOT %less = pred[]{:T(512)} compare(%m, %limit), direction=LT
}

ENTRY %main (x0: f32[8]) -> (s32[], f32[8]) {
  %x0 = f32[8]{0:T(128)} parameter(0)
  %one = s32[]{:T(128)} constant(1)
  %begin = s32[]{:T(128)} copy(%one)
  %init = (s32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%begin, %x0)
  ROOT %loop = (s32[]{:T(128)}, f32[8]{0:T(128)}) while(%init), condition=%condition, body=%body
}
"""


# A loop of 3 trips as XLA for GPUs dumps it. `state#1` stands for a get-tuple-element. Each trip slices one layer of
# 4 KiB of the stacked weights, multiplies with it, and puts the product, with a workspace, into a stack.
DUMPED = """HloModule jit_step

%fused_slice (stack: f32[3,32,32], n: s32[]) -> f32[32,32] {
  %stack = f32[3,32,32]{2,1,0} parameter(0)
  %n = s32[] parameter(1)
  %zero = s32[] constant(0)
  %layer = f32[1,32,32]{2,1,0} dynamic-slice(%stack, %n, %zero, %zero), dynamic_slice_sizes={1,32,32}
  ROOT %flat = f32[32,32]{1,0} bitcast(%layer)
}

%fused_put (left: f32[32,32], right: f32[32,32], kept: f32[3,32,32], m: s32[]) -> (f32[3,32,32], s8[65536]) {
  %left = f32[32,32]{1,0} parameter(0)
  %right = f32[32,32]{1,0} parameter(1)
  %kept = f32[3,32,32]{2,1,0} parameter(2)
  %m = s32[] parameter(3)
  %none = s32[] constant(0)
  %gemm = (f32[32,32]{1,0}, s8[65536]{0}) custom-call(%left, %right), custom_call_target="__cublas$lt$matmul"
  %row = f32[1,32,32]{2,1,0} bitcast(%gemm#0)
  %put = f32[3,32,32]{2,1,0} dynamic-update-slice(%kept, %row, %m, %none, %none)
  ROOT %both = (f32[3,32,32]{2,1,0}, s8[65536]{0}) tuple(%put, %gemm#1)
}

%body (state: (s32[], f32[3,32,32], (f32[32,32], f32[3,32,32]))) -> (s32[], f32[3,32,32], (f32[32,32], f32[3,32,32])) {
  %state = (s32[], f32[3,32,32]{2,1,0}, /*index=2*/(f32[32,32]{1,0}, f32[3,32,32]{2,1,0})) parameter(0)
  %sliced = f32[32,32]{1,0} fusion(%state#1, %state#0), kind=kLoop, calls=%fused_slice
  %product = (f32[3,32,32]{2,1,0}, s8[65536]{0}) fusion(%state#2#0, %sliced, %state#2#1, %state#0), kind=kCustom, \
calls=%fused_put
  %sum = (f32[32,32]{1,0}, s8[65536]{0}) custom-call(%state#2#0, %sliced, %state#2#0), \
custom_call_target="__cublas$lt$matmul", output_to_operand_aliasing={{0}: (2, {})}, metadata={}
  %inner = (f32[32,32]{1,0}, f32[3,32,32]{2,1,0}) tuple(%sum#0, %product#0)
  ROOT %after = (s32[], f32[3,32,32]{2,1,0}, (f32[32,32]{1,0}, f32[3,32,32]{2,1,0})) tuple(%state#0, %state#1, %inner)
}

%condition (old: (s32[], f32[3,32,32], (f32[32,32], f32[3,32,32]))) -> pred[] {
  %old = (s32[], f32[3,32,32]{2,1,0}, (f32[32,32]{1,0}, f32[3,32,32]{2,1,0})) parameter(0)
  %limit = s32[] constant(3)
  ROOT %less = pred[] compare(%old#0, %limit), direction=LT
}

ENTRY %main (x: (s32[], f32[3,32,32], (f32[32,32], f32[3,32,32]))) -> (s32[], f32[3,32,32], (f32[32,32], \
f32[3,32,32])) {
  %x = (s32[], f32[3,32,32]{2,1,0}, (f32[32,32]{1,0}, f32[3,32,32]{2,1,0})) parameter(0)
  ROOT %loop = (s32[], f32[3,32,32]{2,1,0}, (f32[32,32]{1,0}, f32[3,32,32]{2,1,0})) while(%x), condition=%condition, \
body=%body, backend_config={"known_trip_count":{"n":"3"}}
}
"""


def test_dumped_programs_name_elements_of_tuples_by_number():
    """No tuple is read whole. Of a stack, a trip reads the slice and writes the update. No workspace is written."""
    costs, step = count(DUMPED)
    assert step is None
    sliced, product, addition = (4 * KIB + 4, 4 * KIB), (8 * KIB + 4, 4 * KIB), (8 * KIB, 4 * KIB)
    assert (costs.read, costs.written) == tuple(3 * sum(sides) for sides in zip(sliced, product, addition, strict=True))


@pytest.mark.parametrize("begin, step, trips", [(1, 2, 4), (0, 2, 4), (0, 1, 8), (0, 3, 3)])
def test_trips_of_a_loop_that_counts_in_steps(begin, step, trips):
    """XLA unrolls the loops that it makes of products and their collectives: their counters take steps of two."""
    text = LOOP.replace("constant(1)", f"constant({begin})").replace("constant(2)", f"constant({step})")
    program = Program(text)
    (loop,) = (i for i in program.computations["main"].values() if i.opcode == "while")
    assert program.trips(loop, program.computations["main"]) == trips


def test_the_bound_is_the_slowest_of_memory_compute_and_network():
    peaks = bounds.Peaks.of(CHIPS["v5e"], (2, 4))
    assert peaks.ici == 3 * 50e9  # one link along the side of two, two along the side of four
    costs = Costs(819_000_000, 0, 197_000_000_000, 0, 0, (Collective("all-reduce", 1, 0, 450_000_000, 0),))
    found = bounds.bound(costs, peaks)
    assert found["by"] == "network" and found["seconds"] == pytest.approx(3e-3)
    assert found["memory_seconds"] == found["compute_seconds"] == pytest.approx(1e-3)
    assert bounds.bound(costs, peaks, formula=788e9)["seconds"] == pytest.approx(4e-3)
    assert bounds.bound(costs, peaks, kernels=788e9)["compute_seconds"] == pytest.approx(1e-3)  # it runs none
    alone = bounds.Peaks.of(CHIPS["tpu7x"], (1, 1, 1))  # two devices of one chip exchange without links
    assert alone.ici == 0 and bounds.bound(costs, alone)["network_seconds"] == 0
    untold = dataclasses.replace(costs, kernels=1)
    assert bounds.bound(untold, peaks, kernels=788e9)["compute_seconds"] == pytest.approx(5e-3)
    assert bounds.bound(costs, peaks, spared=409_500_000)["memory_seconds"] == pytest.approx(0.5e-3)


@libtpu
def test_every_chip_of_the_table_is_a_topology():
    for name, chip in CHIPS.items():
        sides = "2x2x1" if chip.dimensions == 3 else "2x2"
        assert len(plan.tpu_slice(f"{name}:{sides}").devices) == 4 * chip.devices
