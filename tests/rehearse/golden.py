# ruff: noqa: E501
"""A program that can be checked by hand, as jax 0.10.2 and as jax 0.12 print it.

Four devices, expert 2 x tensor 2, two on a host. Three times: an all-to-all between hosts behind a
matrix product, then a second product, then an all-reduce inside the host that nothing hides.
"""

from moe_jax.plan.hardware import Chip
from tests.plan import protocols

MESH = {"stage": 1, "expert": 2, "tensor": 2}
GPUS_PER_HOST = 2

# Without latencies, and with memory too fast to matter.
CHIP = Chip(
  name="round",
  peak_flops_per_s={"bfloat16": 1e12, "float32": 1e11},
  memory_bytes=1e9,
  memory_bytes_per_s=1e18,
  inside_bytes_per_s=1e9,
  between_bytes_per_s=1e8,
  source="round numbers",
  protocols=protocols.steps(0.0),
)

GEMM_S = 2e9 / 1e12  # 2 x 1000^3 operations
EXCHANGE_BYTES = 2 * 100 * 1000 * 2 / 2  # half of [2, 100, 1000] bfloat16 goes to the other device
EXCHANGE_S = EXCHANGE_BYTES / 1e8
REDUCE_BYTES = 2 * (2 - 1) / 2 * 500 * 1000 * 2
REDUCE_S = REDUCE_BYTES / 1e9
TURNS = 3

_TEMPLATE = """HloModule golden, is_scheduled=true, entry_computation_layout={{(bf16[]{{}})->bf16[]}}

%gemm (p0: bf16[1000,1000], p1: bf16[1000,1000]) -> bf16[1000,1000] {{
  %p0 = bf16[1000,1000]{{1,0}} parameter(0)
  %p1 = bf16[1000,1000]{{1,0}} parameter(1)
  ROOT %dot.1 = bf16[1000,1000]{{1,0}} dot(%p0, %p1), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}, metadata={{op_name="jit(step)/while/body/attention/dot_general"}}
}}

%sum (a: bf16[], b: bf16[]) -> bf16[] {{
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %add.1 = bf16[] add(%a, %b)
}}
{wrapped}
%body (carry: (s32[], bf16[1000,1000], bf16[2,100,1000], bf16[500,1000])) -> (s32[], bf16[1000,1000], bf16[2,100,1000], bf16[500,1000]) {{
  %carry = (s32[], bf16[1000,1000]{{1,0}}, bf16[2,100,1000]{{2,1,0}}, /*index=3*/bf16[500,1000]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %x = bf16[1000,1000]{{1,0}} get-tuple-element(%carry), index=1
  %rows = bf16[2,100,1000]{{2,1,0}} get-tuple-element(%carry), index=2
  %partial = bf16[500,1000]{{1,0}} get-tuple-element(%carry), index=3
{exchange_start}
  %gemm.1 = bf16[1000,1000]{{1,0}} fusion(%x, %x), kind=kCustom, calls=%gemm, metadata={{op_name="jit(step)/while/body/attention/dot_general"}}
{exchange_done}
  %gemm.2 = bf16[1000,1000]{{1,0}} fusion(%gemm.1, %x), kind=kCustom, calls=%gemm, metadata={{op_name="jit(step)/while/body/transpose(jvp(experts))/dot_general"}}
{reduce}
  ROOT %next = (s32[], bf16[1000,1000]{{1,0}}, bf16[2,100,1000]{{2,1,0}}, bf16[500,1000]{{1,0}}) tuple(%i, %gemm.2, %exchanged, %reduced)
}}

%condition (carry.1: (s32[], bf16[1000,1000], bf16[2,100,1000], bf16[500,1000])) -> pred[] {{
  %carry.1 = (s32[], bf16[1000,1000]{{1,0}}, bf16[2,100,1000]{{2,1,0}}, bf16[500,1000]{{1,0}}) parameter(0)
  ROOT %more = pred[] constant(true)
}}

ENTRY %main (start: (s32[], bf16[1000,1000], bf16[2,100,1000], bf16[500,1000])) -> bf16[1000,1000] {{
  %start = (s32[], bf16[1000,1000]{{1,0}}, bf16[2,100,1000]{{2,1,0}}, bf16[500,1000]{{1,0}}) parameter(0)
  %while.1 = (s32[], bf16[1000,1000]{{1,0}}, bf16[2,100,1000]{{2,1,0}}, bf16[500,1000]{{1,0}}) while(%start), condition=%condition, body=%body, metadata={{op_name="jit(step)/while"}}, backend_config={{"known_trip_count":{{"n":"3"}}}}
  ROOT %result = bf16[1000,1000]{{1,0}} get-tuple-element(%while.1), index=1
}}
"""

_EXCHANGE_NAME = 'metadata={op_name="jit(step)/while/body/dispatch/all_to_all"}'
_REDUCE_NAME = 'metadata={op_name="jit(step)/while/body/combine/psum"}'
_ROWS, _PARTIAL = "bf16[2,100,1000]{2,1,0}", "bf16[500,1000]{1,0}"

# Pairs of kind-start and kind-done, groups as lists.
LISTED = _TEMPLATE.format(
  wrapped="",
  exchange_start=f"  %all-to-all-start.1 = (({_ROWS}), {_ROWS}) all-to-all-start(%rows), channel_id=1,"
  f" replica_groups={{{{0,2}},{{1,3}}}}, dimensions={{0}}, {_EXCHANGE_NAME}",
  exchange_done=f"  %exchanged = {_ROWS} all-to-all-done(%all-to-all-start.1), {_EXCHANGE_NAME}",
  reduce=f"  %all-reduce-start.1 = {_PARTIAL} all-reduce-start(%partial), channel_id=2,"
  f" replica_groups={{{{0,1}},{{2,3}}}}, use_global_device_ids=true, to_apply=%sum, {_REDUCE_NAME}\n"
  f"  %reduced = {_PARTIAL} all-reduce-done(%all-reduce-start.1), {_REDUCE_NAME}",
)

# An async computation that wraps the collective, groups along axes of the mesh, and a collective
# that is waited for at once.
WRAPPED = _TEMPLATE.format(
  wrapped=f"""
%wrapped_all_to_all (p: bf16[2,100,1000]) -> bf16[2,100,1000] {{
  %p = {_ROWS} parameter(0)
  ROOT %all_to_all.1 = {_ROWS} all-to-all(%p), channel_id=1, replica_groups=mesh['stage'=1,'expert'=2,'tensor'=2] {{'expert'}}, dimensions={{0}}, {_EXCHANGE_NAME}
}}
""",
  exchange_start=f"  %async-start.1 = (({_ROWS}), {_ROWS}, u32[]) async-start(%rows),"
  " calls=%wrapped_all_to_all",
  exchange_done=f"  %exchanged = {_ROWS} async-done(%async-start.1)",
  reduce=f"  %reduced = {_PARTIAL} all-reduce(%partial), channel_id=2,"
  " replica_groups=mesh['stage'=1,'expert'=2,'tensor'=2] {'tensor'}, use_global_device_ids=true,"
  f" to_apply=%sum, {_REDUCE_NAME}",
)

FORMS = {"listed": LISTED, "wrapped": WRAPPED}

# As XLA's TPU back end prints it: layouts in tiles and memory spaces, a product as a convolution,
# a loop whose turns only its counter tells, a copy of the counter's begin.
_TILED = {
  "{1,0}": "{1,0:T(8,128)(2,1)}",
  "{2,1,0}": "{2,1,0:T(8,128)(2,1)S(1)}",
  "dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}": (
    "convolution(%p0, %p1), dim_labels=bf_io->bf"
  ),
  ', backend_config={"known_trip_count":{"n":"3"}}': "",
  "ROOT %more = pred[] constant(true)": """%turn = s32[]{:T(128)} get-tuple-element(%carry.1), index=0
  %end = s32[]{:T(128)} constant(3)
  ROOT %more = pred[]{:T(512)} compare(%turn, %end), direction=LT""",
  "  ROOT %next = (s32[],": """  %one = s32[]{:T(128)} constant(1)
  %i.1 = s32[]{:T(128)S(6)} copy(%i)
  %following = s32[]{:T(128)} add(%i.1, %one)
  ROOT %next = (s32[],""",
  "tuple(%i, ": "tuple(%following, ",
  "  %while.1 =": """  %zero = s32[]{:T(128)} constant(0)
  %first = s32[]{:T(128)} copy(%zero)
  %x.0 = bf16[1000,1000]{1,0} get-tuple-element(%start), index=1
  %rows.0 = bf16[2,100,1000]{2,1,0} get-tuple-element(%start), index=2
  %partial.0 = bf16[500,1000]{1,0} get-tuple-element(%start), index=3
  %begin = (s32[], bf16[1000,1000], bf16[2,100,1000], bf16[500,1000]) tuple(%first, %x.0, %rows.0, %partial.0)
  %while.1 =""",
  "while(%start)": "while(%begin)",
}
TILED = LISTED
for _old, _new in _TILED.items():
  assert _old in TILED
  TILED = TILED.replace(_old, _new)

# A reduce-scatter as a fusion of an all-reduce and this device's slice of it.
SCATTERED = """HloModule scattered, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%all-reduce-scatter (p: f32[30,8]) -> f32[16,8] {
  %p = f32[30,8]{1,0:T(8,128)} parameter(0)
  %zero = f32[] constant(0)
  %pad = f32[32,8]{1,0:T(8,128)} pad(%p, %zero), padding=0_2x0_0
  %all-reduce = f32[32,8]{1,0:T(8,128)} all-reduce(%pad), channel_id=1, replica_groups={{0,2},{1,3}}, to_apply=%sum
  %from = u32[] partition-id()
  %begin = u32[] constant(0)
  ROOT %dynamic-slice = f32[16,8]{1,0:T(8,128)} dynamic-slice(%all-reduce, %from, %begin), dynamic_slice_sizes={16,8}
}

ENTRY %main (x: f32[30,8]) -> f32[16,8] {
  %x = f32[30,8]{1,0:T(8,128)} parameter(0)
  %made = f32[30,8]{1,0:T(8,128)} negate(%x), metadata={op_name="jit(step)/experts/neg"}
  ROOT %fusion = f32[16,8]{1,0:T(8,128)} fusion(%made), kind=kCustom, calls=%all-reduce-scatter
}
"""
