"""Translates the PTX of a Triton kernel into C++ for the emulated GPU, instruction by instruction.

What a compiler has made of a kernel (barriers, shuffles, layouts, fused operations, roundings) runs then, under the
emulator's random scheduler and its detector of races. An instruction or a form of one that is not known is an error.
"""

from __future__ import annotations

import ctypes
import re

from . import Device, build

WIDTH = {"b8": 8, "b16": 16, "b32": 32, "b64": 64} | {f"{k}{n}": n for k in "us" for n in (8, 16, 32, 64)}
WIDTH |= {"f16": 16, "bf16": 16, "f32": 32, "f64": 64, "pred": 1}
COMPARED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">"}
COMPARED |= {"hs": ">="}
SPECIAL = {"%tid.x": "threadIdx.x", "%ctaid.x": "blockIdx.x", "%ntid.x": "blockDim.x", "%nctaid.x": "gridDim.x"}
ORDERS = {"relaxed": "RELAXED", "acquire": "ACQUIRE", "release": "RELEASE", "acq_rel": "ACQ_REL"}


def split(text: str) -> list[str]:
    """Operands, which commas separate outside of brackets."""
    return [x.strip() for x in re.split(r",(?![^\[{]*[\]}])", text) if x.strip()]


def listed(operand: str) -> list[str]:
    """The registers in braces, or the one that has none."""
    return split(operand.strip("{} ")) if operand.startswith("{") else [operand]


def name(register: str) -> str:
    return register.replace("%", "v_")


def value(operand: str, kind: str) -> str:
    """An operand as a value of a type."""
    if operand in SPECIAL:
        return f"{kind}({SPECIAL[operand]})"
    if operand.startswith("%"):
        if kind == "pred":
            return name(operand)
        if kind in ("f32", "f64"):
            return f"as<{kind}>({name(operand)})"
        return f"{kind}({name(operand)})"
    if match := re.fullmatch(r"0([fd])([0-9A-Fa-f]+)", operand):
        if kind[0] == "f":
            return f"as<{kind}>(b{WIDTH[kind]}(0x{match[2]}))"
        return f"{kind}(0x{match[2]}u)"
    if operand == "global_smem":
        return f"{kind}(0)"
    number = int(operand.rstrip("U"), 0)
    return f"{kind}({number & (1 << 64) - 1:#x}ull)"


def place(operand: str, space: str, kind: str) -> str:
    """A pointer to ``kind`` from an address in brackets."""
    base, sign, offset = re.fullmatch(r"\[\s*([%\w]+)\s*(?:([+-])\s*(-?\d+))?\s*\]", operand).groups()
    offset = f"{sign} {offset}" if sign else ""
    if space == "shared":
        return f"reinterpret_cast<{kind}*>(memory_of_block + (s64(s32({value(base, 'u32')})) {offset}))"
    return f"reinterpret_cast<{kind}*>({value(base, 'u64')} {offset})"


def binary(kind: str, operator: str, a: str, b: str) -> str:
    """An operation on two values of a type; integers wrap around."""
    made = f"u{WIDTH[kind]}" if kind[0] in "sub" else kind
    return f"{made}({value(a, made)} {operator} {value(b, made)})"


class Translator:
    """One entry function."""

    def __init__(self, ptx: str) -> None:
        self.lines = ptx.splitlines()
        self.source = [""] * (len(self.lines) + 1)  # what .loc says of each line
        self.parameters: list[str] = []  # their widths
        self.body: list[str] = []
        self._read()

    def _read(self) -> None:
        inside, at, head = False, "", []
        for number, raw in enumerate(self.lines, 1):
            if match := re.search(r"\.loc\s.*// (\S+)", raw):
                at = match[1]
            self.source[number] = at
            line = raw.split("//")[0].strip()
            if not inside:
                head.append(line)
                inside = line == "{"
                if inside:
                    entry = " ".join(head)
                    self.parameters = re.findall(r"\.param \.[ub](\d+)", entry[entry.index(".entry") :])
                continue
            if line == "}":
                return
            if match := re.fullmatch(r"\{\s*\.reg \.b(?:16|32) tmp;(.*)\}", line):
                line = match[1].replace("tmp", "_")  # half of a register, which nobody reads
            for statement in filter(None, (x.strip() for x in line.split(";"))):
                self._statement(statement, number)
        raise ValueError("no end of the entry")

    def _statement(self, text: str, number: int) -> None:
        if match := re.fullmatch(r"(\$?[\w$]+):(.*)", text):
            self.body.append(f"{match[1].replace('$', 'S')}:;")
            return self._statement(match[2].strip(), number) if match[2].strip() else None
        if match := re.fullmatch(r"\.reg\s+\.(\w+)\s+(%\w+)<(\d+)>", text):
            kind, base, count = match[1], name(match[2]), int(match[3])
            kind = "bool" if kind == "pred" else kind
            self.body += [f"{kind} {base}{i};" for i in range(count)]
            return None
        if text.startswith((".", "$L__func", "$L__tmp")):
            return None
        match = re.fullmatch(r"(?:@(!?%\w+)\s+)?([\w.:]+)\s*(.*)", text)
        if not match:
            raise NotImplementedError(f"line {number}: {text!r}")
        predicate, operation, operands = match.groups()
        code = self._code(operation.split("."), split(operands), text)
        if predicate:
            code = f"if ({predicate.replace('%', 'v_')}) {{ {code} }}"
        self.body.append(f'#line {number} "ptx"\n{code}')
        return None

    def _code(self, parts: list[str], at: list[str], text: str) -> str:
        (
            verb,
            *how,
        ) = parts
        kind = how[-1] if how else ""

        def store(result: str, to: str = at[0] if at else "") -> str:
            return f"{name(to)} = {result};"

        def bits(result: str, of: str) -> str:
            return f"as<b{WIDTH[of]}>({result})" if of in ("f32", "f64") else result

        def unary(template: str) -> str:
            ftz = "ftz" in how and kind == "f32"
            operand = value(at[1], kind)
            operand = f"flushed({operand})" if ftz else operand
            result = template.format(operand)
            return store(bits(f"flushed({result})" if ftz else result, kind))

        if verb in ("bra",):
            return f"goto {at[0].replace('$', 'S')};"
        if verb == "ret":
            return "return;"
        if parts == ["bar", "sync"]:
            assert at == ["0"], text
            return "__syncthreads();"
        if parts[:3] == ["shfl", "sync", "bfly"]:
            assert at[3:] == ["31", "-1"], text
            return store(f"__shfl_xor_sync(0xffffffffu, {value(at[1], 'b32')}, {at[2]})")
        if verb == "ldmatrix":
            assert how == ["sync", "aligned", "m8n8", f"x{len(listed(at[0]))}", "shared", "b16"], text
            row = re.fullmatch(r"\[(%\w+)(?:\+(\d+))?\]", at[1])
            count = len(listed(at[0]))
            code = f"const auto m = matrices<{count}>(memory_of_block, {value(row[1], 'u32')} + {row[2] or 0});"
            return f"{{ {code} {' '.join(f'{name(r)} = m.at[{i}];' for i, r in enumerate(listed(at[0])))} }}"
        if verb in ("ld", "st"):
            return self._memory(verb, how, at, text)
        if verb == "atom":
            space, scope, order, operation, of = how
            assert (space, scope) == ("global", "gpu") and WIDTH[of] == 32, text
            pointer = place(at[1], space, of)
            call = {"add": "fetch_add", "exch": "exchange_n"}[operation]
            return store(f"__atomic_{call}({pointer}, {value(at[2], of)}, __ATOMIC_{ORDERS[order]})")
        if verb == "mov":
            if at[0].startswith("{"):
                parts_, width = listed(at[0]), WIDTH[kind] // len(listed(at[0]))
                done = [
                    f"{name(r)} = b{width}({value(at[1], kind)} >> {i * width});"
                    for i, r in enumerate(parts_)
                    if r != "_"
                ]
                return " ".join(done) or ";"
            if at[1].startswith("{"):
                parts_, width = listed(at[1]), WIDTH[kind] // len(listed(at[1]))
                shifted = [f"{kind}({value(r, f'b{width}')}) << {i * width}" for i, r in enumerate(parts_)]
                return store(f"{kind}({' | '.join(shifted)})")
            if kind == "pred":
                return store(value(at[1], kind) if at[1][0] == "%" else str(int(at[1], 0) != 0).lower())
            return store(value(at[1], "b" + kind[1:]))
        if verb == "selp":
            kind = f"b{WIDTH[kind]}"
            return store(f"{value(at[3], 'pred')} ? {value(at[1], kind)} : {value(at[2], kind)}")
        if verb == "setp":
            return store(self._compare(how, at, text))
        if verb == "cvt":
            return store(self._convert(how, at, text))
        if verb in ("and", "or", "xor"):
            sign = {"and": "&", "or": "|", "xor": "^"}[verb]
            if kind == "pred":
                return store(f"bool({value(at[1], kind)} {sign} {value(at[2], kind)})")
            return store(binary(kind, sign, at[1], at[2]))
        if verb == "not":
            return store(f"!{value(at[1], kind)}" if kind == "pred" else f"{kind}(~{value(at[1], kind)})")
        if verb == "shl":
            return store(f"shifted_left<{kind}>({value(at[1], kind)}, {value(at[2], 'u32')})")
        if verb == "shr":
            return store(f"shifted_right<{kind}>({value(at[1], kind)}, {value(at[2], 'u32')})")
        if verb == "bfe":
            assert kind == "u32", text
            start, count = value(at[2], "u32"), value(at[3], "u32")
            return store(f"(shifted_right<u32>({value(at[1], kind)}, {start}) & ((1ull << {count}) - 1))")
        if verb == "prmt":
            return store(f"permuted({', '.join(value(x, 'u32') for x in at[1:])})")
        if verb == "fma":
            assert how[0] == "rn" and len(how) == 2, text
            operands = ", ".join(value(x, kind) for x in at[1:])
            return store(bits(f"std::fma({operands})", kind))
        if verb in ("add", "sub", "mul", "div") and kind in ("f32", "f64"):
            assert how == ["rn", kind], text
            sign = {"add": "+", "sub": "-", "mul": "*", "div": "/"}[verb]
            return store(bits(binary(kind, sign, at[1], at[2]), kind))
        if verb == "sqrt":
            assert how == ["rn", kind], text
            return unary("std::sqrt({})")
        if verb == "rcp":
            assert how == ["approx", "ftz", "f64"], text
            return store(bits(f"reciprocal({value(at[1], kind)})", kind))
        if verb == "neg" and kind in ("f32", "f64"):
            return unary("(-{})")
        if verb == "neg":
            return store(f"u{WIDTH[kind]}(0 - {value(at[1], f'u{WIDTH[kind]}')})")
        if verb == "abs" and kind in ("f32", "f64"):
            return unary("std::fabs({})")
        if verb in ("min", "max"):
            function = {"min": "least", "max": "most"}[verb]
            if how == ["NaN", "f32"]:
                function += "_or_nan"
            else:
                assert how == [kind], text
            return store(bits(f"{function}({value(at[1], kind)}, {value(at[2], kind)})", kind))
        if parts in (["add", "s16x2"], ["add", "u16x2"]):
            return store(f"added_by_halves({value(at[1], 'u32')}, {value(at[2], 'u32')})")
        if verb in ("add", "sub"):
            assert how == [kind], text
            return store(binary(kind, {"add": "+", "sub": "-"}[verb], at[1], at[2]))
        if verb == "mul" and how[0] == "lo":
            return store(binary(kind, "*", at[1], at[2]))
        if verb in ("mul", "mad") and how[0] == "wide":
            wide = f"{kind[0]}{2 * WIDTH[kind]}"
            product = f"u{2 * WIDTH[kind]}({wide}({value(at[1], kind)}) * {wide}({value(at[2], kind)}))"
            more = f" + {value(at[3], 'u' + wide[1:])}" if verb == "mad" else ""
            return store(f"{product}{more}")
        if verb == "mad" and how[0] == "lo":
            made = f"u{WIDTH[kind]}"
            return store(f"{made}({value(at[1], made)} * {value(at[2], made)} + {value(at[3], made)})")
        if verb in ("rem", "div"):
            function = {"rem": "remainder_of", "div": "quotient_of"}[verb]
            return store(f"{function}<{kind}>({value(at[1], kind)}, {value(at[2], kind)})")
        raise NotImplementedError(text)

    def _memory(self, verb: str, how: list[str], at: list[str], text: str) -> str:
        space, *how, kind = how
        space = space.removesuffix("::cta")
        if space == "param":
            return f"{name(at[0])} = {re.search(r'_param_[0-9]+', at[1])[0]};"
        assert space in ("global", "shared"), text
        if how[:1] == ["gpu"] and verb == "ld":
            return f"{name(at[0])} = __atomic_load_n({place(at[1], space, kind)}, __ATOMIC_{ORDERS[how[1]]});"
        registers = listed(at[0] if verb == "ld" else at[1])
        count = int(how.pop()[1:]) if how and how[-1][0] == "v" else 1
        assert not how and count == len(registers) and kind[0] == "b", text
        if count == 1:
            pointer = place(at[1] if verb == "ld" else at[0], space, kind)
            if verb == "ld":
                return f"{name(registers[0])} = *{pointer};"
            x = value(registers[0], kind)
            return f"write_shared<{kind}>({pointer}, {x});" if space == "shared" else f"*{pointer} = {x};"
        vector = f"vector_of<{kind}, {count}>"
        if verb == "ld":
            taken = " ".join(f"{name(r)} = vector.at[{i}];" for i, r in enumerate(registers) if r != "_")
            return f"{{ const auto vector = *{place(at[1], space, vector)}; {taken} }}"
        values = ", ".join(value(r, kind) for r in registers)
        pointer = place(at[0], space, vector)
        done = f"write_shared({pointer}, vector);" if space == "shared" else f"*{pointer} = vector;"
        return f"{{ {vector} vector{{{{{values}}}}}; {done} }}"

    def _compare(self, how: list[str], at: list[str], text: str) -> str:
        how_compared, *rest, kind = how
        assert not rest, text
        a, b = value(at[1], kind), value(at[2], kind)
        if kind in ("f32", "f64"):
            if how_compared == "nan":
                return f"({a} != {a} || {b} != {b})"
            if how_compared == "num":
                return f"({a} == {a} && {b} == {b})"
            unordered = how_compared[-1] == "u"
            sign = COMPARED[how_compared.removesuffix("u")]
            nan = f"({a} != {a} || {b} != {b})"
            return f"({nan} || {a} {sign} {b})" if unordered else f"(!{nan} && {a} {sign} {b})"
        return f"({a} {COMPARED[how_compared]} {b})"

    def _convert(self, how: list[str], at: list[str], text: str) -> str:
        *mode, to, source = how
        if to in ("bf16x2", "f16x2"):
            assert mode == ["rn"] and source == "f32", text
            function = f"{to[:-2]}_of"
            high, low = (f"b32({function}({value(x, 'f32')}))" for x in at[1:])
            return f"({high} << 16 | {low})"
        if source in ("bf16", "f16"):
            assert not mode and to in ("f32", "f64"), text
            function = {"bf16": "lrk::from_bfloat16", "f16": "lrk::from_float16"}[source]
            return f"as<b{WIDTH[to]}>({to}({function}({value(at[1], 'b16')})))"
        if to in ("bf16", "f16"):
            assert mode == ["rn"] and source == "f32", text
            return f"{to}_of({value(at[1], source)})"
        if to in ("f32", "f64") and source in ("f32", "f64"):
            a, function = value(at[1], source), ""
            if mode[:1] == ["rmi"]:
                a, mode, function = f"flushed({a})" if mode[1:] == ["ftz"] else a, mode[2:], "std::floor"
                assert (to, source) == ("f32", "f32"), text
            assert mode == (["rn"] if WIDTH[to] < WIDTH[source] else []), text
            return f"as<b{WIDTH[to]}>({to}({function}({a})))"
        if to in ("f32", "f64"):
            assert mode == ["rn"], text
            return f"as<b{WIDTH[to]}>({to}({value(at[1], source)}))"
        if source in ("f32", "f64"):
            assert mode == ["rzi"], text
            return f"u{WIDTH[to]}(truncated<{to}>({value(at[1], source)}))"
        assert not mode, text
        return f"u{WIDTH[to]}({to}({value(at[1], source)}))"

    def cpp(self, shared: int) -> str:
        kinds = [f"b{width}" for width in self.parameters]
        given = ", ".join(f"{kind} _param_{i}" for i, kind in enumerate(kinds))
        values = " ".join(f"{kind} p{i} = {kind}(values[{i}]);" for i, kind in enumerate(kinds))
        pointers = ", ".join(f"&p{i}" for i in range(len(kinds)))
        return "\n".join(
            [
                '#include "ptx.h"\n\nnamespace {',
                f"alignas(128) __shared__ unsigned char memory_of_block[{max(shared, 16)}];",
                f"__global__ void kernel({given}) {{",
                *self.body,
                "}\n}  // namespace",
                'extern "C" int ptx_launch(const uint64_t* values, unsigned blocks, unsigned threads) {',
                f"{values} void* arguments[] = {{{pointers}}};",
                "return cudaLaunchKernel(kernel, dim3(blocks), dim3(threads), arguments, 0, nullptr);\n}\n",
            ]
        )


class PtxDevice(Device):
    """An emulated GPU with a kernel of so many threads and bytes of shared memory."""

    def __init__(self, ptx: str, shared: int, threads: int, seed: int = 0, resident: int = 2) -> None:
        translated = Translator(ptx)
        self.source, self.parameters, self.threads = translated.source, len(translated.parameters), threads
        super().__init__(build(translated.cpp(shared)), seed, resident)

    def launch(self, blocks: int, arguments: list[int]) -> None:
        """Launch with addresses and integers."""
        values = (ctypes.c_uint64 * self.parameters)(*(x & (1 << 64) - 1 for x in arguments))
        self.check("the launch has failed" if self.library.ptx_launch(values, blocks, self.threads) else "")

    def _with_lines(self, message: str) -> str:
        """Return the message with the lines of the kernel's source beside those of the PTX."""
        found = super()._with_lines(message)
        return re.sub(r"\b(?:ptx:|line )(\d+)", lambda m: f"{m[0]} ({self.source[int(m[1])]})", found)
