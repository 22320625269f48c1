// The Python module lrkernels._C. Tensors are read through DLPack's exchange API, which torch carries since 2.10: raw
// views in some nanoseconds each, with no libtorch header and no version of torch or Python in the binary.

#define PY_SSIZE_T_CLEAN
#include <ATen/dlpack.h>
#include <Python.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "handles.h"
#include "kernels.h"

namespace {

using lrk::Dtype;
using lrk::Job;
using lrk::Row;

const DLPackExchangeAPI* exchange = nullptr;
constexpr DLDevice kHost{kDLCPU, 0};

std::string name_of(DLDevice device) {
  return device.device_type == kDLCPU ? "CPU" : "CUDA:" + std::to_string(device.device_id);
}

// A tensor's memory, as DLPack tells it; `data` is null for None.
struct View : DLTensor {
  bool present = false;
  bool empty() const { return numel() == 0; }

  int64_t numel() const {
    int64_t count = 1;
    for (int i = 0; i < ndim; ++i) count *= shape[i];
    return count;
  }

  void* memory() const { return static_cast<char*>(data) + byte_offset; }

  // False, with no error set, for what is no tensor with memory.
  bool read(PyObject* object) {
    present = object != Py_None;
    if (!present) return true;
    if (!handles::read(object, this) && exchange->dltensor_from_py_object_no_sync(object, this) != 0) {
      PyErr_Clear();
      return false;
    }
    return data || empty();  // a subclass may have no memory of its own
  }

  // Likewise for what is none of this device's.
  bool read(PyObject* object, DLDevice wanted) {
    if (!read(object)) return false;
    const bool same = wanted.device_type == kDLCPU || device.device_id == wanted.device_id;
    return !present || (device.device_type == wanted.device_type && same);
  }

  bool is(DLDataTypeCode code, int bits) const { return dtype.code == code && dtype.bits == bits && dtype.lanes == 1; }

  Dtype element() const {  // kTypesOf is in the order of Dtype
    int known = 0;
    while (known < lrk::kDtypes && std::memcmp(&dtype, &handles::kTypesOf[known], sizeof dtype) != 0) ++known;
    return Dtype(known);
  }
};

// The same elements in the same places: equal sizes, and equal strides where a stride means something.
bool same_layout(const View& a, const View& b) {
  if (a.ndim != b.ndim) return false;
  for (int i = 0; i < a.ndim; ++i)
    if (a.shape[i] != b.shape[i] || (a.shape[i] != 1 && a.strides[i] != b.strides[i])) return false;
  return true;
}

// Every address between the first and the last element holds exactly one element.
bool is_dense(const View& a) {
  int64_t expected = 1;
  bool contiguous = true;
  for (int i = a.ndim - 1; i >= 0; --i) {
    if (a.shape[i] == 1) continue;
    contiguous = contiguous && a.strides[i] == expected;
    expected *= a.shape[i];
  }
  if (contiguous) return true;
  std::vector<bool> used(a.ndim, false);
  int64_t stride = 1;
  for (int found = 0; found < a.ndim; ++found) {  // the dimension with the next stride, until there is none
    int next = -1;
    for (int i = 0; i < a.ndim; ++i)
      if (!used[i] && (a.shape[i] == 1 || a.strides[i] == stride)) next = i;
    if (next < 0) return false;
    used[next] = true;
    stride *= a.shape[next];
  }
  return true;
}

PyObject* error(const std::string& message) {
  PyErr_SetString(PyExc_ValueError, ("lrkernels: " + message).c_str());
  return nullptr;
}

// A reference that is given up at the end of its scope.
struct Reference {
  PyObject* object;
  explicit Reference(PyObject* owned) : object(owned) {}
  Reference(const Reference&) = delete;
  PyObject* give() { return std::exchange(object, nullptr); }
  ~Reference() { Py_XDECREF(object); }
};

// One of the small tensors: contiguous, of `rows` rows or more, and of exactly `columns` columns.
template <class T>
bool small(const char* name, PyObject* object, DLDevice where, DLDataTypeCode code, int64_t rows, int64_t columns,
           T** out, int64_t* size = nullptr) {
  View view;
  const auto refuse = [&](const std::string& more) {
    error(std::string(name) + " must be a contiguous " + name_of(where) + " tensor of " +
          (code == kDLInt ? "int" : "float") + std::to_string(8 * sizeof(T)) + more);
    return false;
  };
  if (!view.read(object, where) || !view.present || !view.is(code, 8 * sizeof(T))) return refuse("");
  int64_t stride = 1;
  for (int i = view.ndim - 1; i >= 0; stride *= view.shape[i--])
    if (view.shape[i] > 1 && view.strides[i] != stride) return refuse("");
  const int64_t found = view.ndim ? view.shape[0] : 1;
  if (found < rows || view.numel() != found * columns)
    return refuse(" with " + std::to_string(rows) + " rows of " + std::to_string(columns));
  *out = static_cast<T*>(view.memory());
  if (size) *size = found;
  return true;
}

// Where the tensors of one argument come from: a list of tensors, or a pair (list of dictionaries, key), for states.
struct Column {
  PyObject* list = nullptr;
  PyObject* key = nullptr;

  bool parse(PyObject* argument) {
    if (argument == Py_None) return true;
    list = argument;
    if (PyTuple_Check(argument)) {
      list = PyTuple_GetItem(argument, 0);
      key = list ? PyTuple_GetItem(argument, 1) : nullptr;
      if (!key) return false;
    }
    return PyList_Check(list);
  }

  // A borrowed reference: the tensor, or with a key the dictionary that it is in.
  PyObject* entry(Py_ssize_t i) const { return list ? PyList_GetItem(list, i) : Py_None; }

  // The dictionary's tensor; None where there is no such tensor; null after an error.
  PyObject* item(PyObject* dictionary) const {
    PyObject* found = PyDict_GetItemWithError(dictionary, key);
    return found || PyErr_Occurred() ? found : Py_None;
  }
};

const char* const kColumns[] = {"params", "grads", "state0", "state1", "state2", "master", "prev_read", "prev_write"};
constexpr int kLists = 2 + lrk::kStates + 3;  // params, grads, states, masters, previous gradients to read and to write

constexpr Py_ssize_t kAhead = 16;  // rows

// Collects the objects of rows `begin` to `end`, and prefetches their memory; false after an error.
bool gather(const Column (&columns)[kLists], Py_ssize_t begin, Py_ssize_t end, PyObject* (&items)[kAhead][kLists]) {
  for (int k = 0; k < kLists; ++k)
    for (Py_ssize_t i = begin; i < end; ++i) handles::fetch(items[i - begin][k] = columns[k].entry(i));
  for (int k = 0; k < kLists; ++k) {
    for (Py_ssize_t i = begin; columns[k].key && i < end; ++i) {
      PyObject*& item = items[i - begin][k];
      if (!(item = columns[k].item(item))) return false;
      handles::fetch(item);
    }
  }
  for (int k = 0; k < kLists; ++k)
    for (Py_ssize_t i = begin; columns[k].list && i < end; ++i) handles::fetch_impl(items[i - begin][k]);
  return true;
}

// Whether the rule reads state `k` in this group.
bool needs_state(const Job& job, int32_t group, int k) {
  const double* hyper = job.hyper + group * lrk::kHypers;
  if (job.rule == lrk::kSgd) return k == 0 && hyper[lrk::kMomentum] != 0;
  return k < 2 || hyper[lrk::kAmsgrad] != 0;
}

// Whether the tensor stands for minus what its memory holds, as the imaginary part of a conjugate does. More than one
// number of that kind are never dense, and so go through a copy anyway.
bool sign_is_pending(PyObject* tensor) {
  const Reference answer(PyObject_CallMethod(tensor, "is_neg", nullptr));
  const bool pending = answer.object && PyObject_IsTrue(answer.object) == 1;
  PyErr_Clear();
  return pending;
}

// Reads row `i`. 1: added, or left out for want of a gradient; 0: its layout needs a copy; -1: an error.
int add_row(Job& job, DLDevice where, PyObject* const (&items)[kLists], Py_ssize_t i, int32_t group, float* counts) {
  View views[kLists];
  const View &param = views[0], &grad = views[1];
  for (int k : {1, 0, 2, 3, 4, 5, 6, 7}) {
    if (!views[k].read(items[k], where) || (views[k].present && views[k].element() == lrk::kDtypes)) {
      error(std::string(kColumns[k]) + "[" + std::to_string(i) + "] is not a dense " + name_of(where) +
            " tensor of float32, float64, bfloat16 or float16");
      return -1;
    }
    if (!grad.present) return 1;
  }
  if (grad.element() != param.element() && grad.element() != lrk::kFloat32) {
    error("grads[" + std::to_string(i) + "] is neither of its parameter's dtype nor float32");
    return -1;
  }
  Row row{};
  row.state_dtype = param.element();
  for (int k = 0; k < lrk::kStates; ++k) {
    const View& state = views[2 + k];
    if (!state.present && needs_state(job, group, k)) {
      error("the rule needs " + std::string(kColumns[2 + k]) + "[" + std::to_string(i) + "], which is missing");
      return -1;
    }
    if (!state.present) continue;
    if (row.states[0] && state.element() != row.state_dtype) {
      error("the states of parameter " + std::to_string(i) + " are of several dtypes");
      return -1;
    }
    row.states[k] = state.memory();
    row.state_dtype = state.element();
  }
  for (const View& view : views)
    if (view.present && !same_layout(view, param)) return 0;
  if (!param.empty() && !is_dense(param)) return 0;
  if (grad.numel() == 1 && sign_is_pending(items[1])) return 0;
  const View &master = views[kLists - 3], &prev_read = views[kLists - 2], &prev_write = views[kLists - 1];
  if (master.present && master.element() != lrk::kFloat32) {
    error("master[" + std::to_string(i) + "] is not float32");
    return -1;
  }
  if (prev_read.present && prev_write.present && prev_read.element() != prev_write.element()) {
    error("prev_read[" + std::to_string(i) + "] and prev_write[" + std::to_string(i) + "] are of different dtypes");
    return -1;
  }
  row.param = param.memory();
  row.grad = grad.memory();
  row.master = master.present ? master.memory() : nullptr;
  row.prev_write = prev_write.present ? prev_write.memory() : nullptr;
  row.prev_read = prev_read.present ? prev_read.memory() : row.prev_write;
  row.prev_dtype = prev_write.present ? prev_write.element() : prev_read.present ? prev_read.element() : grad.element();
  row.counts = counts + i * lrk::kCounts;
  row.numel = param.numel();
  row.group = group;
  row.index = int32_t(i);
  row.param_dtype = param.element();
  row.grad_dtype = grad.element();
  job.rows.push_back(row);
  return 1;
}

const char run_doc[] =
    "run(verbs, rule, measure, two_pass, params, grads, state0, state1, state2, master, prev_read, prev_write, groups, "
    "counts, control, settings, lr, hyper, table, decay, history, found_inf, grad_scale, workspace=None)\n--\n\n"
    "Runs the verbs where control is, or changes nothing and returns the indices of the rows whose tensors do not "
    "share one dense layout. Without a verb it checks, and no more. On a GPU it puts one launch on torch's current "
    "stream, and the workspace is a tuple of the memory for it: address and bytes on the device, all zero at first; "
    "address on the device, pinned address and bytes for a "
    "list of the rows. Where they are too small, a BufferError has the bytes wanted of both, and nothing has changed.";

// The device that control is on, and the rest should be; false, with an error, where there are no kernels for it.
bool device_of(PyObject* control, DLDevice& where) {
  View view;
  const bool known = control != Py_None && exchange->dltensor_from_py_object_no_sync(control, &view) == 0;
  PyErr_Clear();
  if (known && view.device.device_type == kDLCPU) return where = kHost, true;
#if defined(LRK_CUDA)
  if (known && view.device.device_type == kDLCUDA) return where = view.device, true;
#endif
  return error("control is not a tensor on a device that this build has kernels for"), false;
}

#if defined(LRK_CUDA)
bool run_on_gpu(const Job& job, int verbs, int device, PyObject* memory) {
  unsigned long long addresses[3] = {};
  lrk::cuda::Workspace workspace{};
  long long memory_bytes = 0, list_bytes = 0;
  if (memory != Py_None) {
    if (!PyTuple_Check(memory) ||
        !PyArg_ParseTuple(memory, "KLKKL", &addresses[0], &memory_bytes, &addresses[1], &addresses[2], &list_bytes))
      return PyErr_Clear(), error("the workspace is a tuple of five integers"), false;
  }
  workspace.memory = reinterpret_cast<void*>(addresses[0]);
  workspace.memory_bytes = memory_bytes;
  workspace.list = reinterpret_cast<void*>(addresses[1]);
  workspace.pinned = reinterpret_cast<void*>(addresses[2]);
  workspace.list_bytes = list_bytes;
  void* stream = nullptr;
  if (exchange->current_work_stream(kDLCUDA, device, &stream) != 0) return false;
  PyThreadState* state = PyEval_SaveThread();
  const char* failed = lrk::cuda::run(job, verbs, device, stream, workspace);
  PyEval_RestoreThread(state);
  if (failed)
    return PyErr_Format(PyExc_RuntimeError, "lrkernels: the CUDA kernels were not launched: %s", failed), false;
  if (workspace.memory) return true;
  const Reference wanted(Py_BuildValue("LL", (long long)(workspace.memory_bytes), (long long)(workspace.list_bytes)));
  if (wanted.object) PyErr_SetObject(PyExc_BufferError, wanted.object);
  return false;
}
#endif

PyObject* run(PyObject*, PyObject* args) {
  int verbs;
  Job job{};
  int two_pass;
  PyObject* lists[kLists];
  Column columns[kLists];
  PyObject *groups, *counts, *control, *settings, *lr, *hyper, *table, *decay, *history, *found_inf, *grad_scale;
  PyObject* workspace = Py_None;
  if (!PyArg_ParseTuple(args, "iiipOOOOOOOOOOOOOOOOOOO|O", &verbs, &job.rule, &job.measure, &two_pass, &lists[0],
                        &lists[1], &lists[2], &lists[3], &lists[4], &lists[5], &lists[6], &lists[7], &groups, &counts,
                        &control, &settings, &lr, &hyper, &table, &decay, &history, &found_inf, &grad_scale,
                        &workspace))
    return nullptr;
  job.two_pass = two_pass != 0;
  for (int k = 0; k < kLists; ++k)
    if (!columns[k].parse(lists[k])) return error("run() takes lists of tensors, or pairs (dictionaries, key)");
  const Py_ssize_t size = columns[0].list ? PyList_Size(columns[0].list) : 0;
  for (int k = 0; k < kLists; ++k)
    if (columns[k].list ? PyList_Size(columns[k].list) != size : k < 2 && size != 0)
      return error(std::string(kColumns[k]) + " must have one entry for each of params");
  int32_t* group_of = nullptr;
  float* counts_of = nullptr;
  DLDevice where = kHost;
  if (!device_of(control, where)) return nullptr;
  if (!small("lr", lr, where, kDLFloat, 1, 1, const_cast<double**>(&job.lr), &job.groups) ||
      !small("hyper", hyper, kHost, kDLFloat, job.groups, lrk::kHypers, const_cast<double**>(&job.hyper)) ||
      !small("groups", groups, kHost, kDLInt, size, 1, &group_of) ||
      !small("counts", counts, where, kDLFloat, size, lrk::kCounts, &counts_of) ||
      !small("settings", settings, kHost, kDLFloat, lrk::kSettings, 1, const_cast<double**>(&job.settings)) ||
      !small("control", control, where, kDLFloat, lrk::kRingAt + int64_t(job.settings[lrk::kCapacity]), 1,
             &job.control) ||
      !small("table", table, where, kDLFloat, 1, 1, const_cast<double**>(&job.table), &job.table_size) ||
      !small("decay", decay, where, kDLFloat, 1, 1, const_cast<double**>(&job.decay), &job.decay_size) ||
      !small("history", history, where, kDLFloat, 1, lrk::kStats, &job.history, &job.history_size) ||
      (found_inf != Py_None &&
       !small("found_inf", found_inf, where, kDLFloat, 1, 1, const_cast<float**>(&job.found_inf))) ||
      (grad_scale != Py_None &&
       !small("grad_scale", grad_scale, where, kDLFloat, 1, 1, const_cast<float**>(&job.grad_scale))))
    return nullptr;
  for (Py_ssize_t i = 0; i < size; ++i)
    if (group_of[i] < 0 || group_of[i] >= job.groups) return error("groups names a group that hyper has no row for");
  Reference uneven(PyList_New(0));
  if (!uneven.object) return nullptr;
  job.rows.reserve(size_t(size));
  // What is read of a tensor is scattered over memory, so some rows are prefetched at a time.
  PyObject* items[kAhead][kLists];
  for (Py_ssize_t i = 0, begin = 0; i < size; ++i) {
    if (i == begin + kAhead) begin = i;
    if (i == begin && !gather(columns, begin, std::min(begin + kAhead, size), items)) return nullptr;
    const int added = add_row(job, where, items[i - begin], i, group_of[i], counts_of);
    if (added < 0) return nullptr;
    if (added == 0 && verbs != lrk::kDecideVerb) {  // which needs the sums alone
      const Reference index(PyLong_FromSsize_t(i));
      if (!index.object || PyList_Append(uneven.object, index.object) != 0) return nullptr;
    }
  }
  if (PyList_Size(uneven.object) == 0 && where.device_type == kDLCPU) {
    PyThreadState* state = PyEval_SaveThread();
    lrk::cpu::run(job, verbs);
    PyEval_RestoreThread(state);
  }
#if defined(LRK_CUDA)
  if (PyList_Size(uneven.object) == 0 && where.device_type == kDLCUDA && verbs != 0 &&
      !run_on_gpu(job, verbs, where.device_id, workspace))
    return nullptr;
#else
  (void)workspace;
#endif
  const Reference rows(PyLong_FromSize_t(job.rows.size()));
  return rows.object ? PyTuple_Pack(2, uneven.object, rows.object) : nullptr;
}

PyObject* connect(PyObject*, PyObject* capsule) {
  const auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (!api) return nullptr;
  if (api->header.version.major != DLPACK_MAJOR_VERSION || !api->dltensor_from_py_object_no_sync)
    return error("this torch's DLPack exchange API is of another version");
  exchange = api;
  Py_RETURN_NONE;
}

PyObject* locate(PyObject*, PyObject* tensors) {
  if (!PyList_Check(tensors)) return error("locate() takes a list of tensors");
  return PyBool_FromLong(handles::locate(tensors));
}

// The list of one attribute of each tensor; None where there is none.
PyObject* attributes(PyObject* tensors, const handles::Attribute& attribute) {
  if (!PyList_Check(tensors)) return error("gradients() and versions() take a list of tensors");
  const Py_ssize_t size = PyList_Size(tensors);
  Reference found(PyList_New(size));
  for (Py_ssize_t i = 0; found.object && i < size; ++i) {
    PyObject* tensor = PyList_GetItem(tensors, i);
    PyObject* value = tensor == Py_None ? Py_NewRef(Py_None) : handles::get(attribute, tensor);
    if (!value || PyList_SetItem(found.object, i, value) != 0) return nullptr;
  }
  return found.give();
}

PyObject* gradients(PyObject*, PyObject* params) {
  return attributes(params, handles::grad);
}

PyObject* versions(PyObject*, PyObject* tensors) {
  return attributes(tensors, handles::version);
}

// Everything but the values: two calls with equal answers have had the same memory in the same layouts.
PyObject* seen(PyObject*, PyObject* tensors) {
  if (!PyList_Check(tensors)) return error("seen() takes a list of tensors");
  const Py_ssize_t size = PyList_Size(tensors);
  std::vector<int64_t> layouts, addresses;
  layouts.reserve(size_t(size) * 12);
  addresses.reserve(size_t(size));
  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject* tensor = PyList_GetItem(tensors, i);
    View view;
    if (tensor == Py_None) {
      layouts.push_back(-1);
      addresses.push_back(0);
      continue;
    }
    if (!view.read(tensor)) Py_RETURN_NONE;
    for (int64_t word : {view.ndim, int32_t(view.dtype.code), int32_t(view.dtype.bits),
                         int32_t(view.device.device_type), view.device.device_id})
      layouts.push_back(word);
    layouts.insert(layouts.end(), view.shape, view.shape + view.ndim);
    layouts.insert(layouts.end(), view.strides, view.strides + view.ndim);
    addresses.push_back(reinterpret_cast<int64_t>(view.memory()));
  }
  const auto bytes = [](const std::vector<int64_t>& words) {
    return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(words.data()), words.size() * sizeof(int64_t));
  };
  const Reference first(bytes(layouts)), second(bytes(addresses));
  return first.object && second.object ? PyTuple_Pack(2, first.object, second.object) : nullptr;
}

PyObject* holds(PyObject*, PyObject* args) {
  PyObject *container, *values;
  if (!PyArg_ParseTuple(args, "OO", &container, &values)) return nullptr;
  const bool dictionary = PyDict_Check(container);
  if (!(dictionary || PyList_Check(container)) || !PyList_Check(values))
    return error("holds() takes a list or a dictionary, and a list");
  const Py_ssize_t size = PyList_Size(values);
  bool same = (dictionary ? PyDict_Size(container) : PyList_Size(container)) == size;
  PyObject *key, *value;
  Py_ssize_t at = 0;
  for (Py_ssize_t i = 0; same && i < size; ++i) {
    if (!dictionary)
      value = PyList_GetItem(container, i);
    else if (!PyDict_Next(container, &at, &key, &value))
      break;
    same = value == PyList_GetItem(values, i);
  }
  return PyBool_FromLong(same);
}

PyObject* instruction_set(PyObject*, PyObject*) {
  return PyUnicode_FromString(lrk::cpu::instruction_set());
}

PyObject* cuda_architectures(PyObject*, PyObject*) {
#if defined(LRK_CUDA)
  return PyUnicode_FromString(LRK_CUDA);
#else
  Py_RETURN_NONE;
#endif
}

PyMethodDef methods[] = {
    {"connect", connect, METH_O, "Takes torch.Tensor.__dlpack_c_exchange_api__; before anything else."},
    {"locate", locate, METH_O,
     "locate(tensors): looks for the handle in a torch.Tensor and a torch.nn.Parameter; whether it is found."},
    {"holds", holds, METH_VARARGS,
     "holds(container, values): whether these very objects are a list's items, or a dictionary's values, in order."},
    {"seen", seen, METH_O,
     "seen(tensors): as bytes, what each is (dtype, device, sizes, strides), and where; None where one has no memory."},
    {"gradients", gradients, METH_O, "gradients(params): the list of their .grad."},
    {"versions", versions, METH_O, "versions(tensors): the list of their ._version, and None for None."},
    {"run", run, METH_VARARGS, run_doc},
    {"instruction_set", instruction_set, METH_NOARGS, "The instruction set that the CPU kernels use on this machine."},
    {"cuda_architectures", cuda_architectures, METH_NOARGS, "What the CUDA kernels were compiled for, or None."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", "The native kernels.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  return PyModule_Create(&module);
}
