// Tensors read through torch's C shim, in a quarter of the time that DLPack's exchange API takes. The shim wants a
// handle: the address of a word that holds the tensor's TensorImpl. A tensor's Python object has such a word. Where,
// no interface says, so `locate` looks for `Tensor._cdata` in the objects of the types at hand when the module is
// connected, and asks the shim whether it is the right one. Whatever is in doubt stays with DLPack: other types, other
// layouts and dtypes, a torch whose objects look different.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <ATen/dlpack.h>
#include <Python.h>

#include <cstring>

extern "C" {
int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_device_type_cuda();
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_float64();
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_dtype_float16();
int32_t aoti_torch_layout_strided();
int32_t aoti_torch_get_layout(const void* tensor, int32_t* layout);
int32_t aoti_torch_get_device_type(const void* tensor, int32_t* type);
int32_t aoti_torch_get_device_index(const void* tensor, int32_t* index);
int32_t aoti_torch_get_dtype(const void* tensor, int32_t* dtype);
int32_t aoti_torch_get_dim(const void* tensor, int64_t* dim);
int32_t aoti_torch_get_sizes(const void* tensor, int64_t** sizes);
int32_t aoti_torch_get_strides(const void* tensor, int64_t** strides);
int32_t aoti_torch_get_data_ptr(const void* tensor, void** data);
}

namespace handles {

constexpr int kTypes = 2;                 // torch.Tensor and torch.nn.Parameter
constexpr int kLine = 64;                 // bytes that come together from memory
constexpr int kHead = 3 * kLine;          // of a TensorImpl: what the shim reads
inline PyTypeObject* types[kTypes] = {};  // whose objects hold a handle; borrowed from torch, which keeps them
inline Py_ssize_t offset = 0;             // and where; 0: not found

// An attribute of theirs, read without a search for it.
struct Attribute {
  const char* name;
  PyObject* descriptor = nullptr;  // borrowed from its class
  descrgetfunc getter = nullptr;
};
inline Attribute grad{"grad"}, version{"_version"};

struct Codes {
  int32_t strided, cpu, cuda, dtypes[4];
};
inline Codes codes;
inline const DLDataType kTypesOf[4] = {{kDLFloat, 32, 1}, {kDLFloat, 64, 1}, {kDLBfloat, 16, 1}, {kDLFloat, 16, 1}};

// The tensor's handle, or null for what is none of the types.
inline const void* of(PyObject* object) {
  PyTypeObject* type = Py_TYPE(object);
  return offset && (type == types[0] || type == types[1]) ? reinterpret_cast<char*>(object) + offset : nullptr;
}

inline void* impl(const void* handle) {
  void* found;
  std::memcpy(&found, handle, sizeof found);
  return found;
}

// Fills `out` as DLPack would; false where the tensor is left to DLPack.
inline bool read(PyObject* object, DLTensor* out) {
  const void* handle = of(object);
  int32_t layout, type, index = 0, dtype;
  int64_t dim;
  // The layout first: of a sparse tensor the rest throws, and mkldnn's answers all of it as if it were dense.
  if (!handle || aoti_torch_get_layout(handle, &layout) != 0 || layout != codes.strided) return false;
  if (aoti_torch_get_device_type(handle, &type) != 0 || (type != codes.cpu && type != codes.cuda)) return false;
  if (type == codes.cuda && aoti_torch_get_device_index(handle, &index) != 0) return false;
  if (aoti_torch_get_dtype(handle, &dtype) != 0) return false;
  int known = 0;
  while (known < 4 && dtype != codes.dtypes[known]) ++known;
  if (known == 4) return false;
  if (aoti_torch_get_dim(handle, &dim) != 0 || aoti_torch_get_sizes(handle, &out->shape) != 0 ||
      aoti_torch_get_strides(handle, &out->strides) != 0 || aoti_torch_get_data_ptr(handle, &out->data) != 0)
    return false;
  out->device = {type == codes.cpu ? kDLCPU : kDLCUDA, index};
  out->ndim = int32_t(dim);
  out->dtype = kTypesOf[known];
  out->byte_offset = 0;
  return true;
}

inline void fetch(const void* address) {
  __builtin_prefetch(address);
}

// Prefetches the cache lines that `read` will need; the object itself must be there.
inline void fetch_impl(PyObject* object) {
  const void* handle = of(object);
  if (!handle) return;
  const char* head = static_cast<const char*>(impl(handle));
  for (int at = 0; at < kHead; at += kLine) fetch(head + at);
}

// What an attribute of `object` holds as an address; null where it is none.
inline void* address(PyObject* object, const char* name, bool call) {
  PyObject* value = call ? PyObject_CallMethod(object, name, nullptr) : PyObject_GetAttrString(object, name);
  void* found = value ? PyLong_AsVoidPtr(value) : nullptr;
  Py_XDECREF(value);
  PyErr_Clear();
  return found;
}

// Looks for the handle in tensors with memory, one of each type; true where all have one at the same place.
inline bool locate(PyObject* tensors) {
  offset = 0;
  codes = {aoti_torch_layout_strided(),
           aoti_torch_device_type_cpu(),
           aoti_torch_device_type_cuda(),
           {aoti_torch_dtype_float32(), aoti_torch_dtype_float64(), aoti_torch_dtype_bfloat16(),
            aoti_torch_dtype_float16()}};
  Py_ssize_t found = 0;
  for (int k = 0; k < kTypes; ++k) {
    PyObject* tensor = PyList_GetItem(tensors, k);
    if (!tensor) return PyErr_Clear(), false;
    PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
    const auto size = reinterpret_cast<Py_ssize_t>(address(type, "__basicsize__", false));
    const void* wanted = address(tensor, "_cdata", false);
    int places = 0;
    for (Py_ssize_t at = sizeof(PyObject); wanted && at + Py_ssize_t(sizeof(void*)) <= size; at += sizeof(void*)) {
      if (impl(reinterpret_cast<char*>(tensor) + at) != wanted) continue;
      if (++places > 1 || (found && at != found)) return false;
      found = at;
    }
    void* data = nullptr;
    if (places != 1 || aoti_torch_get_data_ptr(reinterpret_cast<char*>(tensor) + found, &data) != 0 || !data ||
        data != address(tensor, "data_ptr", true))
      return false;
    types[k] = Py_TYPE(tensor);
    for (Attribute* attribute : {&grad, &version}) {
      PyObject* descriptor = PyObject_GetAttrString(type, attribute->name);
      PyErr_Clear();
      Py_XDECREF(descriptor);  // its class keeps it
      if (!descriptor || (k > 0 && descriptor != attribute->descriptor)) return false;
      attribute->descriptor = descriptor;
      attribute->getter = reinterpret_cast<descrgetfunc>(PyType_GetSlot(Py_TYPE(descriptor), Py_tp_descr_get));
      if (!attribute->getter) return false;
    }
  }
  offset = found;
  return true;
}

// A tensor's attribute, a new reference; without a search for it where the type is known.
inline PyObject* get(const Attribute& attribute, PyObject* tensor) {
  if (of(tensor)) return attribute.getter(attribute.descriptor, tensor, reinterpret_cast<PyObject*>(Py_TYPE(tensor)));
  return PyObject_GetAttrString(tensor, attribute.name);
}

}  // namespace handles
