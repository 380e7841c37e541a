/* The slice of ONNX Runtime's C interface that ort.cpp needs, declared by hand.
 *
 * The interface is a table of function pointers to which releases only ever append, so what is named here keeps its
 * place: slots are counted from 0 in the table that OrtApiBase::GetApi returns. Only types that cross the border are
 * declared, and everything of ONNX Runtime's own is opaque.
 */
#ifndef LNS_ORT_ABI_H
#define LNS_ORT_ABI_H

#include <cstddef>
#include <cstdint>

#if defined(_WIN32)
#define LNS_ORT_CALL __stdcall
#else
#define LNS_ORT_CALL
#endif

extern "C" {

struct OrtStatus;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtValue;
struct OrtTensorTypeAndShapeInfo;
struct OrtShapeInferContext;

/* The table; read through ort::call. */
typedef void(LNS_ORT_CALL* OrtSlot)(void);
struct OrtApi {
  OrtSlot slots[276];
};

struct OrtApiBase {
  const OrtApi*(LNS_ORT_CALL* GetApi)(uint32_t version);
  const char*(LNS_ORT_CALL* GetVersionString)(void);
};

/* One operator for one combination of element types; enumerations are ints. ONNX Runtime reads as many fields as
 * `version` says its author knew: those after GetEndVersion are not read, and null. */
struct OrtCustomOp {
  uint32_t version;
  void*(LNS_ORT_CALL* CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char*(LNS_ORT_CALL* GetName)(const OrtCustomOp*);
  const char*(LNS_ORT_CALL* GetExecutionProviderType)(const OrtCustomOp*);
  int(LNS_ORT_CALL* GetInputType)(const OrtCustomOp*, size_t index);
  size_t(LNS_ORT_CALL* GetInputTypeCount)(const OrtCustomOp*);
  int(LNS_ORT_CALL* GetOutputType)(const OrtCustomOp*, size_t index);
  size_t(LNS_ORT_CALL* GetOutputTypeCount)(const OrtCustomOp*);
  void(LNS_ORT_CALL* KernelCompute)(void* kernel, OrtKernelContext*);
  void(LNS_ORT_CALL* KernelDestroy)(void* kernel);
  int(LNS_ORT_CALL* GetInputCharacteristic)(const OrtCustomOp*, size_t index);
  int(LNS_ORT_CALL* GetOutputCharacteristic)(const OrtCustomOp*, size_t index);
  int(LNS_ORT_CALL* GetInputMemoryType)(const OrtCustomOp*, size_t index);
  int(LNS_ORT_CALL* GetVariadicInputMinArity)(const OrtCustomOp*);
  int(LNS_ORT_CALL* GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int(LNS_ORT_CALL* GetVariadicOutputMinArity)(const OrtCustomOp*);
  int(LNS_ORT_CALL* GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus*(LNS_ORT_CALL* CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void** kernel);
  OrtStatus*(LNS_ORT_CALL* KernelComputeV2)(void* kernel, OrtKernelContext*);
  OrtStatus*(LNS_ORT_CALL* InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
  int(LNS_ORT_CALL* GetStartVersion)(const OrtCustomOp*);
  int(LNS_ORT_CALL* GetEndVersion)(const OrtCustomOp*);
  void* later[4];
};

}  // extern "C"

namespace ort {

/* The oldest version of the table that has all slots below, and of OrtCustomOp that has all fields above. */
constexpr uint32_t api_version = 17;

enum Code : int { code_fail = 1, code_invalid_argument = 2, code_runtime_exception = 6, code_not_implemented = 9 };

/* Element types, as in ONNX. */
enum Type : int { undefined = 0, float32 = 1, uint8 = 2, uint16 = 4, int32 = 6, int64 = 7 };

enum Characteristic : int { required = 0, optional = 1 };

/* A function of the table: its place and its type. */
template <size_t slot_, class Function_>
struct Entry {
  static constexpr size_t slot = slot_;
  using Function = Function_;
};

using CreateStatus = Entry<0, OrtStatus*(LNS_ORT_CALL*)(int code, const char* message)>;
using GetErrorMessage = Entry<2, const char*(LNS_ORT_CALL*)(const OrtStatus*)>;
using CreateCustomOpDomain = Entry<26, OrtStatus*(LNS_ORT_CALL*)(const char* domain, OrtCustomOpDomain** out)>;
using CustomOpDomainAdd = Entry<27, OrtStatus*(LNS_ORT_CALL*)(OrtCustomOpDomain*, const OrtCustomOp*)>;
using AddCustomOpDomain = Entry<28, OrtStatus*(LNS_ORT_CALL*)(OrtSessionOptions*, OrtCustomOpDomain*)>;
using GetTensorMutableData = Entry<51, OrtStatus*(LNS_ORT_CALL*)(OrtValue*, void** out)>;
using GetTensorElementType = Entry<60, OrtStatus*(LNS_ORT_CALL*)(const OrtTensorTypeAndShapeInfo*, int* out)>;
using GetDimensionsCount = Entry<61, OrtStatus*(LNS_ORT_CALL*)(const OrtTensorTypeAndShapeInfo*, size_t* out)>;
using GetDimensions =
    Entry<62, OrtStatus*(LNS_ORT_CALL*)(const OrtTensorTypeAndShapeInfo*, int64_t* out, size_t count)>;
using GetTensorTypeAndShape = Entry<65, OrtStatus*(LNS_ORT_CALL*)(const OrtValue*, OrtTensorTypeAndShapeInfo** out)>;
using KernelInfoGetAttributeInt64 =
    Entry<86, OrtStatus*(LNS_ORT_CALL*)(const OrtKernelInfo*, const char* name, int64_t* out)>;
using KernelContextGetInputCount = Entry<88, OrtStatus*(LNS_ORT_CALL*)(const OrtKernelContext*, size_t* out)>;
using KernelContextGetOutputCount = Entry<89, OrtStatus*(LNS_ORT_CALL*)(const OrtKernelContext*, size_t* out)>;
using KernelContextGetInput =
    Entry<90, OrtStatus*(LNS_ORT_CALL*)(const OrtKernelContext*, size_t index, const OrtValue** out)>;
using KernelContextGetOutput = Entry<91, OrtStatus*(LNS_ORT_CALL*)(OrtKernelContext*, size_t index,
                                                                   const int64_t* shape, size_t rank, OrtValue** out)>;
using ReleaseStatus = Entry<93, void(LNS_ORT_CALL*)(OrtStatus*)>;
using ReleaseTensorTypeAndShapeInfo = Entry<99, void(LNS_ORT_CALL*)(OrtTensorTypeAndShapeInfo*)>;
using ReleaseCustomOpDomain = Entry<101, void(LNS_ORT_CALL*)(OrtCustomOpDomain*)>;
/* `size`: the room in `out` on the way in, the number of integers on the way out; null `out` only counts. */
using KernelInfoGetAttributeArrayInt64 =
    Entry<163, OrtStatus*(LNS_ORT_CALL*)(const OrtKernelInfo*, const char* name, int64_t* out, size_t* size)>;
using KernelInfoGetNodeName = Entry<244, OrtStatus*(LNS_ORT_CALL*)(const OrtKernelInfo*, char* out, size_t* size)>;
/* The value lives as long as the kernel. */
using KernelInfoGetConstantInputTensor =
    Entry<249, OrtStatus*(LNS_ORT_CALL*)(const OrtKernelInfo*, size_t index, int* is_constant, const OrtValue** out)>;

template <class E>
typename E::Function get(const OrtApi* api) {
  return reinterpret_cast<typename E::Function>(api->slots[E::slot]);
}

}  // namespace ort

#endif
