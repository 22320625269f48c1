// The Python module lrkernels._C. Tensors are read through DLPack's exchange API, which torch carries since 2.10: raw
// views in some nanoseconds each, with no libtorch header and no version of torch or Python in the binary.

#define PY_SSIZE_T_CLEAN
#include <ATen/dlpack.h>
#include <Python.h>

#include <cstring>
#include <string>

#include "kernels.h"

namespace {

using lrk::Dtype;
using lrk::Job;
using lrk::Row;

const DLPackExchangeAPI* exchange = nullptr;

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

  bool read(PyObject* object) {
    present = object != Py_None;
    return !present || exchange->dltensor_from_py_object_no_sync(object, this) == 0;
  }

  bool is(DLDataTypeCode code, int bits) const { return dtype.code == code && dtype.bits == bits && dtype.lanes == 1; }

  Dtype element() const {
    if (is(kDLFloat, 32)) return lrk::kFloat32;
    if (is(kDLFloat, 64)) return lrk::kFloat64;
    if (is(kDLBfloat, 16)) return lrk::kBFloat16;
    if (is(kDLFloat, 16)) return lrk::kFloat16;
    return lrk::kDtypes;
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

template <class T>
bool pointer(PyObject* object, int bits, T** out, int64_t* size = nullptr) {
  View view;
  if (!view.read(object)) return false;
  *out = view.present ? static_cast<T*>(view.memory()) : nullptr;
  if (size) *size = view.ndim ? view.shape[0] : 1;
  if (!view.present || view.is(kDLFloat, bits)) return true;
  error("a control tensor has an unexpected dtype");
  return false;
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

  // A borrowed reference; None where there is no such tensor; null after an error.
  PyObject* item(Py_ssize_t i) const {
    PyObject* found = list ? PyList_GetItem(list, i) : Py_None;
    if (!found || !key) return found;
    found = PyDict_GetItemWithError(found, key);
    return found || PyErr_Occurred() ? found : Py_None;
  }
};

constexpr int kLists = 2 + lrk::kStates + 2;  // params, grads, states, previous gradients to read and to write

// Reads row `i` of the lists. 1: added, or left out for want of a gradient; 0: its layout needs a copy; -1: an error.
int add_row(Job& job, const Column (&columns)[kLists], Py_ssize_t i, const int32_t* groups, float* counts) {
  View views[kLists];
  const View &param = views[0], &grad = views[1];
  for (int k : {1, 0, 2, 3, 4, 5, 6}) {
    PyObject* item = columns[k].item(i);
    if (!item || !views[k].read(item)) return -1;
    if (!grad.present) return 1;
  }
  for (const View& view : views) {
    if (!view.present) continue;
    if (view.device.device_type != kDLCPU) return error("the native CPU kernels were given a tensor elsewhere"), -1;
    if (view.element() == lrk::kDtypes) return error("unsupported dtype"), -1;
    if (!same_layout(view, param)) return 0;
  }
  if (!param.empty() && !is_dense(param)) return 0;
  Row row{};
  row.param = param.memory();
  row.grad = grad.memory();
  row.state_dtype = param.element();
  for (int k = 0; k < lrk::kStates; ++k) {
    if (!views[2 + k].present) continue;
    row.states[k] = views[2 + k].memory();
    row.state_dtype = views[2 + k].element();
  }
  const View &prev_read = views[kLists - 2], &prev_write = views[kLists - 1];
  row.prev_write = prev_write.present ? prev_write.memory() : nullptr;
  row.prev_read = prev_read.present ? prev_read.memory() : row.prev_write;
  row.prev_dtype = prev_write.present ? prev_write.element() : prev_read.present ? prev_read.element() : grad.element();
  row.counts = counts + i * lrk::kCounts;
  row.numel = param.numel();
  row.group = groups[i];
  row.param_dtype = param.element();
  row.grad_dtype = grad.element();
  job.rows.push_back(row);
  return 1;
}

const char run_doc[] =
    "run(verbs, rule, measure, two_pass, params, grads, state0, state1, state2, prev_read, prev_write, groups, counts, "
    "control, settings, lr, hyper, table, decay, history, found_inf, grad_scale)\n--\n\n"
    "Runs the verbs, or changes nothing and returns the indices of the rows whose tensors do not share one dense "
    "layout.";

PyObject* run(PyObject*, PyObject* args) {
  int verbs;
  Job job;
  int two_pass;
  PyObject* lists[kLists];
  Column columns[kLists];
  PyObject *groups, *counts, *control, *settings, *lr, *hyper, *table, *decay, *history, *found_inf, *grad_scale;
  if (!PyArg_ParseTuple(args, "iiipOOOOOOOOOOOOOOOOOO", &verbs, &job.rule, &job.measure, &two_pass, &lists[0],
                        &lists[1], &lists[2], &lists[3], &lists[4], &lists[5], &lists[6], &groups, &counts, &control,
                        &settings, &lr, &hyper, &table, &decay, &history, &found_inf, &grad_scale))
    return nullptr;
  job.two_pass = two_pass != 0;
  View group_view;
  float* counts_in;
  if (!pointer(control, 64, &job.control) || !pointer(settings, 64, const_cast<double**>(&job.settings)) ||
      !pointer(lr, 64, const_cast<double**>(&job.lr)) || !pointer(hyper, 64, const_cast<double**>(&job.hyper)) ||
      !pointer(table, 64, const_cast<double**>(&job.table), &job.table_size) ||
      !pointer(decay, 64, const_cast<double**>(&job.decay), &job.decay_size) ||
      !pointer(history, 64, &job.history, &job.history_size) ||
      !pointer(found_inf, 32, const_cast<float**>(&job.found_inf)) ||
      !pointer(grad_scale, 32, const_cast<float**>(&job.grad_scale)) || !pointer(counts, 32, &counts_in) ||
      !group_view.read(groups))
    return nullptr;
  for (int k = 0; k < kLists; ++k)
    if (!columns[k].parse(lists[k])) return error("run() takes lists of tensors, or (dictionaries, key)");
  if (!columns[0].list || !columns[1].list) return error("run() needs parameters and gradients");
  const Py_ssize_t size = PyList_Size(columns[0].list);
  PyObject* uneven = PyList_New(0);
  if (!uneven) return nullptr;
  job.rows.reserve(size_t(size));
  for (Py_ssize_t i = 0; i < size; ++i) {
    const int added = add_row(job, columns, i, static_cast<const int32_t*>(group_view.memory()), counts_in);
    if (added > 0) continue;
    PyObject* index = added < 0 ? nullptr : PyLong_FromSsize_t(i);
    if (!index || PyList_Append(uneven, index) != 0) {
      Py_XDECREF(index);
      Py_DECREF(uneven);
      return nullptr;
    }
    Py_DECREF(index);
  }
  if (PyList_Size(uneven) == 0) {
    PyThreadState* state = PyEval_SaveThread();
    lrk::cpu::run(job, verbs);
    PyEval_RestoreThread(state);
  }
  return uneven;
}

PyObject* connect(PyObject*, PyObject* capsule) {
  const auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (!api) return nullptr;
  if (api->header.version.major != DLPACK_MAJOR_VERSION || !api->dltensor_from_py_object_no_sync)
    return error("this torch's DLPack exchange API is of another version");
  exchange = api;
  Py_RETURN_NONE;
}

PyObject* instruction_set(PyObject*, PyObject*) {
  return PyUnicode_FromString(lrk::cpu::instruction_set());
}

PyMethodDef methods[] = {
    {"connect", connect, METH_O, "Takes torch.Tensor.__dlpack_c_exchange_api__; before anything else."},
    {"run", run, METH_VARARGS, run_doc},
    {"instruction_set", instruction_set, METH_NOARGS, "The instruction set that the CPU kernels use on this machine."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", "The native kernels.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  return PyModule_Create(&module);
}
