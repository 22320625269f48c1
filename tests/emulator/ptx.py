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
OPERATORS = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
COMPARED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
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
        """One instruction as C++."""
        verb, how, kind = parts[0], parts[1:], parts[-1]
        if verb == "bra":
            return f"goto {at[0].replace('$', 'S')};"
        if verb == "ret":
            return "return;"
        if parts == ["bar", "sync"]:
            assert at == ["0"], text
            return "__syncthreads();"
        if verb in ("ld", "st"):
            return self._memory(verb, how, at, text)
        if verb == "mov" and "{" in text:
            return self._move_parts(at, kind)
        if verb == "ldmatrix":
            registers = listed(at[0])
            assert how == ["sync", "aligned", "m8n8", f"x{len(registers)}", "shared", "b16"], text
            row, offset = re.fullmatch(r"\[(%\w+)(?:\+(\d+))?\]", at[1]).groups()
            code = f"const auto m = matrices<{len(registers)}>(memory_of_block, {value(row, 'u32')} + {offset or 0});"
            return f"{{ {code} {' '.join(f'{name(r)} = m.at[{i}];' for i, r in enumerate(registers))} }}"
        if verb == "atom":
            space, scope, order, operation, _ = how
            assert (space, scope) == ("global", "gpu") and WIDTH[kind] == 32, text
            call = {"add": "fetch_add", "exch": "exchange_n"}[operation]
            operands = f"{place(at[1], space, kind)}, {value(at[2], kind)}, __ATOMIC_{ORDERS[order]}"
            return f"{name(at[0])} = __atomic_{call}({operands});"
        if kind in ("f32", "f64") and verb not in ("setp", "selp", "cvt", "mov"):
            return f"{name(at[0])} = as<b{WIDTH[kind]}>({self._float(verb, how, at, text)});"
        return f"{name(at[0])} = {self._value(verb, how, at, text)};"

    def _float(self, verb: str, how: list[str], at: list[str], text: str) -> str:
        """A floating-point operation. Its rounding must be said: no form is taken that may be less exact."""
        kind = how[-1]
        operands = [value(x, kind) for x in at[1:]]
        if how == ["ftz", "f32"]:
            operands = [f"flushed({x})" for x in operands]
        if verb in ("neg", "abs"):
            assert how in ([kind], ["ftz", "f32"]), text
            return f"{'-' if verb == 'neg' else 'std::fabs'}({operands[0]})"
        if verb in ("min", "max"):
            assert how in ([kind], ["NaN", "f32"]), text
            function = {"min": "least", "max": "most"}[verb] + ("_or_nan" if how[0] == "NaN" else "")
        elif verb == "rcp":
            assert how == ["approx", "ftz", "f64"], text
            function = "reciprocal"
        else:
            assert how == ["rn", kind], text
            if verb in OPERATORS:
                return f"{operands[0]} {OPERATORS[verb]} {operands[1]}"
            function = {"fma": "std::fma", "sqrt": "std::sqrt"}[verb]
        return f"{function}({', '.join(operands)})"

    def _value(self, verb: str, how: list[str], at: list[str], text: str) -> str:
        """What an instruction puts into its register."""
        kind = how[-1]
        a, b, c = [*at[1:], None, None, None][:3]
        if verb == "setp":
            return self._compare(how, at, text)
        if verb == "cvt":
            return self._convert(how, at, text)
        if kind in ("s16x2", "u16x2") and verb == "add":
            return f"added_by_halves({value(a, 'u32')}, {value(b, 'u32')})"
        if verb == "shfl":
            assert how == ["sync", "bfly", "b32"] and at[3:] == ["31", "-1"], text
            return f"__shfl_xor_sync(0xffffffffu, {value(a, kind)}, {b})"
        if verb == "prmt":
            return f"permuted({', '.join(value(x, 'u32') for x in (a, b, c))})"
        if verb in ("mul", "mad") and how[0] == "wide":
            wide = f"{kind[0]}{2 * WIDTH[kind]}"
            product = f"u{wide[1:]}({wide}({value(a, kind)}) * {wide}({value(b, kind)}))"
            return f"{product} + {value(c, 'u' + wide[1:])}" if verb == "mad" else product
        assert how in ([kind], ["lo", kind]) and (how[0] == "lo") == (verb in ("mul", "mad")), text
        if verb == "mov":
            return value(a, "pred" if kind == "pred" else f"b{WIDTH[kind]}")
        if verb == "selp":
            return f"{value(c, 'pred')} ? {value(a, f'b{WIDTH[kind]}')} : {value(b, f'b{WIDTH[kind]}')}"
        if verb in ("and", "or", "xor"):
            sign = {"and": "&", "or": "|", "xor": "^"}[verb]
            return f"{'bool' if kind == 'pred' else kind}({value(a, kind)} {sign} {value(b, kind)})"
        if verb == "not":
            return f"!{value(a, kind)}" if kind == "pred" else f"{kind}(~{value(a, kind)})"
        if verb in ("shl", "shr"):
            return f"shifted_{'left' if verb == 'shl' else 'right'}<{kind}>({value(a, kind)}, {value(b, 'u32')})"
        if verb == "bfe":
            assert kind == "u32", text
            return f"(shifted_right<u32>({value(a, kind)}, {value(b, kind)}) & ((1ull << {value(c, kind)}) - 1))"
        if verb in ("min", "max", "rem"):
            function = {"min": "least", "max": "most", "rem": "remainder_of"}[verb]
            return f"{function}<{kind}>({value(a, kind)}, {value(b, kind)})"
        made = f"u{WIDTH[kind]}"  # integers wrap around
        if verb == "neg":
            return f"{made}(0 - {value(a, made)})"
        if verb == "mad":
            return f"{made}({value(a, made)} * {value(b, made)} + {value(c, made)})"
        if verb in ("add", "sub", "mul"):
            return f"{made}({value(a, made)} {OPERATORS[verb]} {value(b, made)})"
        raise NotImplementedError(text)

    def _move_parts(self, at: list[str], kind: str) -> str:
        """A register into two or more, or the other way round."""
        to, source = map(listed, at)
        width = WIDTH[kind] // max(len(to), len(source))
        if len(to) > 1:
            taken = (
                f"{name(r)} = b{width}({value(at[1], kind)} >> {i * width});" for i, r in enumerate(to) if r != "_"
            )
            return " ".join(taken)
        shifted = (f"{kind}({value(r, f'b{width}')}) << {i * width}" for i, r in enumerate(source))
        return f"{name(to[0])} = {' | '.join(shifted)};"

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
        super().__init__(build({"ptx.cu": translated.cpp(shared)}), seed, resident)

    def launch(self, blocks: int, arguments: list[int]) -> None:
        """Launch with addresses and integers."""
        values = (ctypes.c_uint64 * self.parameters)(*(x & (1 << 64) - 1 for x in arguments))
        self.check("the launch has failed" if self.library.ptx_launch(values, blocks, self.threads) else "")

    def _with_lines(self, message: str) -> str:
        """Return the message with the lines of the kernel's source beside those of the PTX."""
        found = super()._with_lines(message)
        return re.sub(r"\b(?:ptx:|line )(\d+)", lambda m: f"{m[0]} ({self.source[int(m[1])]})", found)
