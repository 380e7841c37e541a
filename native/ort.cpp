/* The operators of domain `lnsdeploy` (docs/operators) for ONNX Runtime: attributes and shapes are
 * checked here, the arithmetic is behind lnsdeploy.h.
 *
 * Nothing in a model is trusted: whatever does not fit its operator's page is a status with a message, at the latest
 * when the node runs.
 *
 * How types are declared: ONNX Runtime infers an output's type from the types of the inputs alone, never from an
 * attribute, and `output_type` is an attribute. So an operator whose output has two possible types is declared with one
 * of any type that may be missing, for which nothing is inferred if all inputs have one type each: then the type is the
 * one that the model states for the tensor. Every combination of input types is an operator object of its own.
 */
#include <algorithm>
#include <atomic>
#include <cerrno>
#include <climits>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "lnsdeploy.h"
#include "ort_abi.h"

namespace {

std::atomic<int64_t> runs{0};

/* Thrown inside, turned into a status at the border. */
struct Failure {
  int code;
  std::string message;
};

[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  throw Failure{ort::code_invalid_argument, text};
}

constexpr int64_t max_size = int64_t{1} << 46;   /* of a tensor, in elements: more than any machine holds */
constexpr int64_t max_axis = INT32_MAX;          /* of a spatial axis, and of what describes windows over one */
constexpr int64_t max_shift = int64_t{1} << 52;  /* in codes; scaled by 2^8 and added to a code it fits 64 bits */
constexpr int64_t max_offset = int64_t{1} << 36; /* likewise, scaled by 2^24 */
constexpr int64_t max_widen = int64_t{1} << 24;

using Shape = std::vector<int64_t>;

std::string text_of(const Shape& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

const char* name_of(int type) {
  switch (type) {
    case ort::float32:
      return "float";
    case ort::uint8:
      return "uint8";
    case ort::uint16:
      return "uint16";
    case ort::int32:
      return "int32";
    case ort::int64:
      return "int64";
  }
  return "another type";
}

/* The number of elements; axes of size 0 make it 0, but no product of the others may leave 64 bits either. */
int64_t elements(const int64_t* shape, size_t rank, const char* what) {
  int64_t count = 1, others = 1;
  for (size_t i = 0; i < rank; ++i) {
    if (shape[i] < 0) fail("%s has an axis of %lld", what, static_cast<long long>(shape[i]));
    if (__builtin_mul_overflow(others, std::max<int64_t>(shape[i], 1), &others)) {
      fail("%s of shape %s has too many elements", what, text_of(Shape(shape, shape + rank)).c_str());
    }
    count *= shape[i];
  }
  if (count > max_size) {
    fail("%s of shape %s has too many elements", what, text_of(Shape(shape, shape + rank)).c_str());
  }
  return count;
}

int64_t elements(const Shape& shape, const char* what) { return elements(shape.data(), shape.size(), what); }

/* What pointers to nothing point to. */
alignas(64) char nothing[64];

struct Tensor {
  const char* name;
  int type;
  Shape shape;
  int64_t count;
  void* data;

  int64_t rank() const { return static_cast<int64_t>(shape.size()); }
  template <class T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
  void check_type(int wanted) const {
    if (type != wanted) fail("%s has elements of %s, not %s", name, name_of(type), name_of(wanted));
  }
  void check_shape(const Shape& wanted) const {
    if (shape != wanted) fail("%s has shape %s, not %s", name, text_of(shape).c_str(), text_of(wanted).c_str());
  }
  void check_list(int wanted) const {
    check_type(wanted);
    if (rank() != 1) fail("%s has shape %s, not one axis", name, text_of(shape).c_str());
  }
};

/* Calls of ONNX Runtime; a status becomes a Failure. */
class Host {
 public:
  explicit Host(const OrtApi* api) : api_(api) {}

  template <class E, class... Arguments>
  void call(Arguments... arguments) const {
    OrtStatus* status = ort::get<E>(api_)(arguments...);
    if (status == nullptr) return;
    std::string message;
    try {
      message = ort::get<ort::GetErrorMessage>(api_)(status);
    } catch (...) {
    }
    ort::get<ort::ReleaseStatus>(api_)(status);
    throw Failure{ort::code_fail, message};
  }

  OrtStatus* status(int code, const char* message) const noexcept {
    return ort::get<ort::CreateStatus>(api_)(code, message);
  }

  Tensor tensor(const OrtValue* value, const char* name) const {
    if (value == nullptr) fail("%s is missing", name);
    struct Release {
      const OrtApi* api;
      void operator()(OrtTensorTypeAndShapeInfo* p) const { ort::get<ort::ReleaseTensorTypeAndShapeInfo>(api)(p); }
    };
    OrtTensorTypeAndShapeInfo* found = nullptr;
    call<ort::GetTensorTypeAndShape>(value, &found);
    std::unique_ptr<OrtTensorTypeAndShapeInfo, Release> info(found, Release{api_});
    Tensor tensor{name, 0, {}, 0, nullptr};
    size_t rank = 0;
    call<ort::GetTensorElementType>(found, &tensor.type);
    call<ort::GetDimensionsCount>(found, &rank);
    tensor.shape.resize(rank);
    if (rank > 0) call<ort::GetDimensions>(found, tensor.shape.data(), rank);
    tensor.count = elements(tensor.shape, name);
    call<ort::GetTensorMutableData>(const_cast<OrtValue*>(value), &tensor.data);
    if (tensor.data == nullptr) {
      if (tensor.count != 0) fail("%s has no data", name);
      tensor.data = nothing;
    }
    return tensor;
  }

  const OrtApi* api() const { return api_; }

 private:
  const OrtApi* api_;
};

/* A node as it is created: attributes, and those inputs that are constants of the model. */
class Node {
 public:
  Node(const Host& host, const OrtKernelInfo* info) : host_(host), info_(info) {}

  std::string name() const {
    char text[256];
    size_t size = sizeof text;
    try {
      host_.call<ort::KernelInfoGetNodeName>(info_, &text[0], &size);
    } catch (const Failure&) { /* longer than that, say: messages do without */
      return "";
    }
    return size > 0 ? std::string(text, strnlen(text, sizeof text)) : "";
  }

  int64_t integer(const std::string& name, int64_t low, int64_t high) const {
    int64_t value = 0;
    try {
      host_.call<ort::KernelInfoGetAttributeInt64>(info_, name.c_str(), &value);
    } catch (const Failure&) {
      fail("attribute %s is missing or not an integer", name.c_str());
    }
    check(name, value, low, high);
    return value;
  }

  void integers(const char* name, int64_t* values, size_t count, int64_t low, int64_t high) const {
    size_t size = 0;
    try {
      host_.call<ort::KernelInfoGetAttributeArrayInt64>(info_, name, static_cast<int64_t*>(nullptr), &size);
    } catch (const Failure&) {
      fail("attribute %s is missing or not a list of integers", name);
    }
    if (size != count) fail("attribute %s has %zu integers, not %zu", name, size, count);
    host_.call<ort::KernelInfoGetAttributeArrayInt64>(info_, name, values, &size);
    for (size_t i = 0; i < count; ++i) check(name, values[i], low, high);
  }

  /* False if it is not known until the node runs. */
  bool constant(size_t index, const char* name, Tensor* out) const {
    int constant = 0;
    const OrtValue* value = nullptr;
    try {
      host_.call<ort::KernelInfoGetConstantInputTensor>(info_, index, &constant, &value);
    } catch (const Failure&) {
      return false;
    }
    if (!constant || value == nullptr) return false;
    *out = host_.tensor(value, name);
    return true;
  }

 private:
  static void check(const std::string& name, int64_t value, int64_t low, int64_t high) {
    if (value < low || value > high) {
      fail("attribute %s is %lld, not %lld to %lld", name.c_str(), static_cast<long long>(value),
           static_cast<long long>(low), static_cast<long long>(high));
    }
  }

  const Host& host_;
  const OrtKernelInfo* info_;
};

/* A node as it runs. */
class Run {
 public:
  Run(const Host& host, OrtKernelContext* context) : host_(host), context_(context) {
    host.call<ort::KernelContextGetInputCount>(const_cast<const OrtKernelContext*>(context), &inputs_);
  }

  Tensor input(size_t index, const char* name) const {
    if (index >= inputs_) fail("%s is missing", name);
    const OrtValue* value = nullptr;
    host_.call<ort::KernelContextGetInput>(const_cast<const OrtKernelContext*>(context_), index, &value);
    return host_.tensor(value, name);
  }

  /* Output Y, to be written. */
  Tensor output(const Shape& shape, int type) const {
    elements(shape, "Y");
    size_t outputs = 0;
    host_.call<ort::KernelContextGetOutputCount>(const_cast<const OrtKernelContext*>(context_), &outputs);
    if (outputs != 1) fail("there are %zu outputs, not 1", outputs);
    OrtValue* value = nullptr;
    host_.call<ort::KernelContextGetOutput>(context_, size_t{0}, shape.data(), shape.size(), &value);
    Tensor made = host_.tensor(value, "Y");
    if (made.type != type) {
      fail("the model states elements of %s for Y, the attributes %s", name_of(made.type), name_of(type));
    }
    made.check_shape(shape);
    return made;
  }

 private:
  const Host& host_;
  OrtKernelContext* context_;
  size_t inputs_ = 0;
};

/* What a function of lnsdeploy.h returned. */
class Checked {
 public:
  lns_error* error() { return &error_; }
  void operator()(int32_t status) {
    if (status == LNS_OK) return;
    text_[sizeof text_ - 1] = 0;
    const int code = status == LNS_BAD_VALUE     ? ort::code_invalid_argument
                     : status == LNS_UNSUPPORTED ? ort::code_not_implemented
                     : status == LNS_NO_MEMORY   ? ort::code_fail
                                                 : ort::code_runtime_exception;
    throw Failure{code, text_};
  }

 private:
  char text_[512] = "";
  lns_error error_{text_, sizeof text_};
};

int thread_count() {
  const char* text = std::getenv("LNSDEPLOY_THREADS");
  if (text != nullptr && *text != 0) {
    char* end = nullptr;
    errno = 0;
    const long value = std::strtol(text, &end, 10);
    if (errno == 0 && *end == 0 && value >= 1) return static_cast<int>(std::min(value, 1024L));
  }
  return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}

/* ------------------------------------------------------------------------------------------------------------
 * What operators have in common */

class Kernel {
 public:
  virtual ~Kernel() = default;
  /* Called by several threads at once. */
  virtual void run(const Run& run) const = 0;

  const char* op = "";
  std::string node;
  Host host{nullptr};
  int threads = 1;
};

lns_format format_of(const Node& node, const std::string& side) {
  const std::string prefix = side.empty() ? "" : side + "_";
  return {static_cast<int32_t>(node.integer(prefix + "bits", 2, 16)),
          static_cast<int32_t>(node.integer(prefix + "signed", 0, 1))};
}

int type_of(lns_format format) { return format.bits <= 8 ? ort::uint8 : ort::uint16; }
int64_t max_code(lns_format format) { return (int64_t{1} << (format.bits - format.is_signed)) - 1; }

/* The output's format without the rule of underflow. */
lns_format output_format(const Node& node) {
  const lns_format format = format_of(node, "output");
  const int64_t type = node.integer("output_type", 0, INT32_MAX);
  if (type != type_of(format)) {
    fail("attribute output_type is %lld, but words of %d bits are %s (%d)", static_cast<long long>(type), format.bits,
         name_of(type_of(format)), type_of(format));
  }
  return format;
}

lns_output output_of(const Node& node) {
  return {output_format(node), static_cast<int32_t>(node.integer("underflow", 0, 1))};
}

lns_window window_of(const Node& node) {
  lns_window window;
  node.integers("kernel_shape", window.kernel, 3, 1, max_axis);
  node.integers("strides", window.strides, 3, 1, max_axis);
  node.integers("pads", window.pads, 6, 0, max_axis);
  node.integers("dilations", window.dilations, 3, 1, max_axis);
  return window;
}

/* The three spatial sizes of X, leading ones for fewer axes. */
void spatial_sizes(const Tensor& x, const lns_window& window, int64_t* size) {
  const int64_t axes = x.rank() - 2;
  if (axes < 1 || axes > 3) fail("X has shape %s, not [B, C, 1 to 3 axes]", text_of(x.shape).c_str());
  for (int i = 0; i < 3; ++i) {
    const int64_t axis = i - (3 - axes);
    if (axis >= 0) {
      size[i] = x.shape[static_cast<size_t>(2 + axis)];
      if (size[i] > max_axis) fail("X has shape %s: an axis is too long", text_of(x.shape).c_str());
      continue;
    }
    size[i] = 1;
    if (window.kernel[i] != 1 || window.strides[i] != 1 || window.dilations[i] != 1 || window.pads[i] != 0 ||
        window.pads[3 + i] != 0) {
      fail("the window covers an axis that X of shape %s does not have", text_of(x.shape).c_str());
    }
  }
}

void window_output(const lns_window& window, const int64_t* size, int64_t* out) {
  Checked checked;
  checked(lns_window_output(&window, size, out, checked.error()));
}

/* [batch, channels, the spatial axes that X has]. */
Shape windows_shape(const Tensor& x, int64_t channels, const int64_t* out) {
  Shape shape{x.shape[0], channels};
  shape.insert(shape.end(), out + (5 - x.rank()), out + 3);
  return shape;
}

struct Deltas {
  Tensor plus, minus;
  Deltas(Tensor p, Tensor m) : plus(std::move(p)), minus(std::move(m)) {
    plus.check_list(ort::int32);
    minus.check_list(ort::int32);
  }
};

/* The log adder of Add and AveragePool. */
struct AdderAttributes {
  int32_t acc_bits, guard_bits;
  explicit AdderAttributes(const Node& node)
      : acc_bits(static_cast<int32_t>(node.integer("acc_bits", 1, 26))),
        guard_bits(static_cast<int32_t>(node.integer("guard_bits", 0, 8))) {}
  lns_adder with(const Deltas& deltas) const {
    return {acc_bits,          guard_bits, deltas.plus.as<int32_t>(), deltas.plus.count, deltas.minus.as<int32_t>(),
            deltas.minus.count};
  }
};

void check_range(const Tensor& values, int64_t low, int64_t high) {
  const int64_t* data = values.as<int64_t>();
  for (int64_t i = 0; i < values.count; ++i) {
    if (data[i] < low || data[i] > high) {
      fail("%s has an entry %lld, not %lld to %lld", values.name, static_cast<long long>(data[i]),
           static_cast<long long>(low), static_cast<long long>(high));
    }
  }
}

/* ------------------------------------------------------------------------------------------------------------
 * Products and convolutions */

struct DestroyDot {
  void operator()(lns_dot* dot) const { lns_dot_destroy(dot); }
};

/* What attributes say of a product. */
lns_dot_desc product_of(const Node& node, bool log) {
  lns_dot_desc desc{};
  desc.log = log;
  desc.activation = format_of(node, "activation");
  desc.weight = format_of(node, "weight");
  desc.activation_widen = node.integer("activation_widen", 1, max_widen);
  desc.weight_widen = node.integer("weight_widen", 1, max_widen);
  desc.output = output_of(node);
  desc.groups = 1;
  desc.lanes = static_cast<int32_t>(node.integer("lanes", 1, 1024));
  if (log) {
    desc.acc_bits = static_cast<int32_t>(node.integer("acc_bits", 1, 26));
    desc.guard_bits = static_cast<int32_t>(node.integer("guard_bits", 0, 8));
  } else {
    desc.acc_bits = static_cast<int32_t>(node.integer("acc_bits", 2, 62));
    desc.psum_bits = static_cast<int32_t>(node.integer("psum_bits", 2, 62));
    desc.saturate = static_cast<int32_t>(node.integer("saturate", 0, 1));
  }
  return desc;
}

void set_tables(lns_dot_desc& desc, const Tensor& terms, const Tensor& constants, const Tensor& thresholds) {
  if (terms.type != ort::int32 && terms.type != ort::int64) {
    fail("terms has elements of %s, not int32 or int64", name_of(terms.type));
  }
  desc.term_columns = max_code(desc.activation) * desc.activation_widen + max_code(desc.weight) * desc.weight_widen + 1;
  if (terms.rank() != 2 || terms.shape[0] < 1 || terms.shape[1] != desc.term_columns) {
    fail("terms has shape %s, not [B, %lld], one column a code sum", text_of(terms.shape).c_str(),
         static_cast<long long>(desc.term_columns));
  }
  desc.terms = terms.data;
  desc.terms_are_64 = terms.type == ort::int64;
  desc.bins = terms.shape[0];
  constants.check_type(ort::int64);
  constants.check_shape({desc.bins});
  desc.constants = constants.as<int64_t>();
  thresholds.check_list(ort::int64);
  desc.thresholds = thresholds.as<int64_t>();
  desc.threshold_count = thresholds.count;
}

void set_deltas(lns_dot_desc& desc, const Tensor& plus, const Tensor& minus) {
  const Deltas deltas(plus, minus);
  desc.delta_plus = deltas.plus.as<int32_t>();
  desc.delta_plus_count = deltas.plus.count;
  desc.delta_minus = deltas.minus.as<int32_t>();
  desc.delta_minus_count = deltas.minus.count;
}

using Made = std::unique_ptr<lns_dot, DestroyDot>;

Made made_of(const lns_dot_desc& desc) {
  Checked checked;
  lns_dot* made = nullptr;
  checked(lns_dot_create(&desc, &made, checked.error()));
  return Made(made);
}

/* A layer made from the inputs after X. */
struct Layer {
  Shape weight;
  Made dot; /* null if there are no output channels */
};

template <bool log, bool convolution>
class Dot : public Kernel {
 public:
  explicit Dot(const Node& node) : desc_(product_of(node, log)) {
    if (convolution) {
      window_ = window_of(node);
      desc_.groups = node.integer("group", 1, max_axis);
    }
    std::vector<Tensor> found;
    for (size_t i = 0; i < names().size(); ++i) {
      Tensor tensor{};
      if (!node.constant(1 + i, names()[i], &tensor)) break;
      found.push_back(std::move(tensor));
    }
    if (found.size() == names().size()) {
      constant_ = make(found);
      is_constant_ = true;
    }
  }

  void run(const Run& run) const override {
    Layer own;
    if (!is_constant_) {
      std::vector<Tensor> found;
      for (size_t i = 0; i < names().size(); ++i) found.push_back(run.input(1 + i, names()[i]));
      own = make(found);
    }
    const Layer& layer = is_constant_ ? constant_ : own;
    const Tensor x = run.input(0, "X");
    x.check_type(type_of(desc_.activation));
    convolution ? convolve(run, x, layer) : multiply(run, x, layer);
  }

 private:
  static const std::vector<const char*>& names() {
    static const std::vector<const char*> linear{"W", "bias", "terms", "constants", "thresholds", "code_shift"};
    static const std::vector<const char*> logarithmic{"W",           "bias",        "delta_plus",
                                                      "delta_minus", "entry_shift", "code_shift"};
    return log ? logarithmic : linear;
  }

  /* Everything that does not depend on X is checked here. */
  Layer make(const std::vector<Tensor>& inputs) const {
    const Tensor &w = inputs[0], &bias = inputs[1], &code_shift = inputs[5];
    lns_dot_desc desc = desc_;
    w.check_type(type_of(desc.weight));
    if (convolution ? w.rank() < 3 || w.rank() > 5 : w.rank() != 2) {
      fail("W has shape %s, not %s", text_of(w.shape).c_str(), convolution ? "[O, C/group, 1 to 3 axes]" : "[N, K]");
    }
    desc.channels = w.shape[0];
    desc.depth = elements(w.shape.data() + 1, w.shape.size() - 1, "W");
    desc.weight_words = w.data;
    if (convolution) {
      if (desc.channels % desc.groups != 0) {
        fail("W has shape %s: its output channels are not those of %lld groups", text_of(w.shape).c_str(),
             static_cast<long long>(desc.groups));
      }
      for (int64_t i = 0; i < 3; ++i) {
        const int64_t axis = i - (5 - w.rank());
        const int64_t size = axis < 0 ? 1 : w.shape[static_cast<size_t>(2 + axis)];
        if (size != window_.kernel[i]) {
          fail("W has shape %s, but kernel_shape is %s", text_of(w.shape).c_str(),
               text_of(Shape(window_.kernel, window_.kernel + 3)).c_str());
        }
      }
    }
    const Shape channels{desc.channels};
    code_shift.check_type(ort::int64);
    code_shift.check_shape(channels);
    check_range(code_shift, -max_shift, max_shift);
    desc.code_shift = code_shift.as<int64_t>();
    bias.check_shape(channels);
    std::vector<int64_t> wide;
    if (log) {
      bias.check_type(ort::int64);
      check_range(bias, 0, (int64_t{2} << desc.acc_bits) - 1);
      desc.bias = bias.as<int64_t>();
      set_deltas(desc, inputs[2], inputs[3]);
      inputs[4].check_type(ort::int64);
      inputs[4].check_shape(channels);
      check_range(inputs[4], -max_shift, max_shift);
      desc.entry_shift = inputs[4].as<int64_t>();
    } else {
      const Tensor& terms = inputs[2];
      set_tables(desc, terms, inputs[3], inputs[4]);
      bias.check_type(terms.type);
      if (terms.type == ort::int64) {
        desc.bias = bias.as<int64_t>();
      } else {
        wide.assign(bias.as<int32_t>(), bias.as<int32_t>() + bias.count);
        wide.reserve(1); /* a pointer, also to nothing */
        desc.bias = wide.data();
      }
    }
    Layer layer{w.shape, nullptr};
    if (desc.channels > 0) layer.dot = made_of(desc);
    return layer;
  }

  void multiply(const Run& run, const Tensor& x, const Layer& layer) const {
    const int64_t depth = layer.weight[1];
    if (x.rank() < 1 || x.shape.back() != depth) {
      fail("X has shape %s, not [..., %lld]", text_of(x.shape).c_str(), static_cast<long long>(depth));
    }
    const int64_t rows = elements(x.shape.data(), x.shape.size() - 1, "X");
    Shape shape = x.shape;
    shape.back() = layer.weight[0];
    const Tensor y = run.output(shape, type_of(desc_.output.format));
    if (y.count == 0) return;
    Checked checked;
    checked(lns_dot_run(layer.dot.get(), x.data, rows, depth, 1, y.data, threads, nullptr, checked.error()));
  }

  void convolve(const Run& run, const Tensor& x, const Layer& layer) const {
    int64_t size[3], out[3], channels;
    spatial_sizes(x, window_, size);
    if (x.shape.size() != layer.weight.size()) {
      fail("X has shape %s, W %s: not the same axes", text_of(x.shape).c_str(), text_of(layer.weight).c_str());
    }
    if (__builtin_mul_overflow(layer.weight[1], desc_.groups, &channels) || x.shape[1] != channels) {
      fail("X has shape %s, which does not fit %lld groups and W of shape %s", text_of(x.shape).c_str(),
           static_cast<long long>(desc_.groups), text_of(layer.weight).c_str());
    }
    window_output(window_, size, out);
    const Tensor y = run.output(windows_shape(x, layer.weight[0], out), type_of(desc_.output.format));
    if (y.count == 0) return;
    Checked checked;
    checked(
        lns_conv_run(layer.dot.get(), &window_, x.data, x.shape[0], size, y.data, threads, nullptr, checked.error()));
  }

  lns_dot_desc desc_{};
  lns_window window_{};
  Layer constant_;
  bool is_constant_ = false;
};

/* Products of two tensors (spec 7.2): a layer for each index of the axes before the last two, as neither is constant.
 */
template <bool log>
class MatMul : public Kernel {
 public:
  explicit MatMul(const Node& node)
      : desc_(product_of(node, log)), code_shift_(node.integer("code_shift", -max_shift, max_shift)) {}

  void run(const Run& run) const override {
    const Tensor a = run.input(0, "A"), b = run.input(1, "B");
    a.check_type(type_of(desc_.activation));
    b.check_type(type_of(desc_.weight));
    const size_t rank = a.shape.size();
    if (rank < 2 || b.shape.size() != rank || !std::equal(a.shape.begin(), a.shape.end() - 2, b.shape.begin()) ||
        a.shape[rank - 1] != b.shape[rank - 2]) {
      fail("A has shape %s, B %s, not [..., M, K] and [..., K, N]", text_of(a.shape).c_str(), text_of(b.shape).c_str());
    }
    const int64_t rows = a.shape[rank - 2], depth = a.shape[rank - 1], columns = b.shape[rank - 1];
    lns_dot_desc desc = desc_;
    desc.channels = columns;
    desc.depth = depth;
    /* the sessions' tables: they live as long as this call */
    const Tensor first = run.input(2, log ? "delta_plus" : "terms");
    const Tensor second = run.input(3, log ? "delta_minus" : "constants");
    const Tensor third = run.input(4, log ? "entry_shift" : "thresholds");
    const std::vector<int64_t> shifts(static_cast<size_t>(columns), code_shift_);
    std::vector<int64_t> entries;
    desc.code_shift = shifts.data();
    if (log) {
      set_deltas(desc, first, second);
      third.check_type(ort::int64);
      third.check_shape({1});
      check_range(third, -max_shift, max_shift);
      entries.assign(static_cast<size_t>(columns), third.as<int64_t>()[0]);
      desc.entry_shift = entries.data();
    } else {
      set_tables(desc, first, second, third);
    }
    Shape shape = a.shape;
    shape.back() = columns;
    const Tensor y = run.output(shape, type_of(desc_.output.format));
    if (y.count == 0) return;
    const size_t of_a = word_bytes(desc_.activation), of_b = word_bytes(desc_.weight);
    const size_t of_y = word_bytes(desc_.output.format);
    std::vector<char> turned(static_cast<size_t>(depth * columns) * of_b + 1);
    desc.weight_words = turned.data();
    const int64_t matrices = y.count / (rows * columns);
    for (int64_t i = 0; i < matrices; ++i) {
      const char* words = static_cast<const char*>(b.data) + static_cast<size_t>(i * depth * columns) * of_b;
      for (int64_t k = 0; k < depth; ++k) {
        for (int64_t n = 0; n < columns; ++n) {
          std::memcpy(turned.data() + static_cast<size_t>(n * depth + k) * of_b,
                      words + static_cast<size_t>(k * columns + n) * of_b, of_b);
        }
      }
      const Made made = made_of(desc);
      Checked checked;
      checked(lns_dot_run(made.get(), static_cast<const char*>(a.data) + static_cast<size_t>(i * rows * depth) * of_a,
                          rows, depth, 1, static_cast<char*>(y.data) + static_cast<size_t>(i * rows * columns) * of_y,
                          threads, nullptr, checked.error()));
    }
  }

 private:
  static size_t word_bytes(lns_format format) { return format.bits <= 8 ? 1 : 2; }

  lns_dot_desc desc_;
  int64_t code_shift_;
};

/* ------------------------------------------------------------------------------------------------------------
 * Other operations */

class Encode : public Kernel {
 public:
  explicit Encode(const Node& node) : format_(output_format(node)) {}

  void run(const Run& run) const override {
    const Tensor x = run.input(0, "X"), thresholds = run.input(1, "thresholds");
    x.check_type(ort::float32);
    thresholds.check_type(ort::float32);
    thresholds.check_shape({max_code(format_)});
    const Tensor y = run.output(x.shape, type_of(format_));
    Checked checked;
    checked(lns_encode(x.as<float>(), x.count, thresholds.as<float>(), thresholds.count, format_, y.data, threads,
                       checked.error()));
  }

 private:
  lns_format format_;
};

class Decode : public Kernel {
 public:
  explicit Decode(const Node&) {}

  void run(const Run& run) const override {
    const Tensor x = run.input(0, "X"), table = run.input(1, "table");
    if (x.type != ort::uint8 && x.type != ort::uint16) {
      fail("X has elements of %s, not uint8 or uint16", name_of(x.type));
    }
    const int bytes = x.type == ort::uint8 ? 1 : 2;
    table.check_list(ort::float32);
    const int64_t least = bytes == 1 ? 1 << 2 : 1 << 9, most = bytes == 1 ? 1 << 8 : 1 << 16;
    if (table.count < least || table.count > most || (table.count & (table.count - 1)) != 0) {
      fail("table has %lld entries, not one for every word of %s", static_cast<long long>(table.count),
           name_of(x.type));
    }
    const Tensor y = run.output(x.shape, ort::float32);
    Checked checked;
    checked(lns_decode(x.data, bytes, x.count, table.as<float>(), table.count, static_cast<float*>(y.data), threads,
                       checked.error()));
  }
};

class Relu : public Kernel {
 public:
  explicit Relu(const Node& node) : format_(format_of(node, "")) {}

  void run(const Run& run) const override {
    const Tensor x = run.input(0, "X");
    x.check_type(type_of(format_));
    const Tensor y = run.output(x.shape, x.type);
    Checked checked;
    checked(lns_relu(x.data, x.count, format_, y.data, threads, checked.error()));
  }

 private:
  lns_format format_;
};

class Clip : public Kernel {
 public:
  explicit Clip(const Node& node) : format_(format_of(node, "")) {
    const int64_t most = max_code(format_), least = format_.is_signed ? -most : 0;
    low_ = node.integer("low", least, most);
    high_ = node.integer("high", low_, most);
  }

  void run(const Run& run) const override {
    const Tensor x = run.input(0, "X");
    x.check_type(type_of(format_));
    const Tensor y = run.output(x.shape, x.type);
    Checked checked;
    checked(lns_clip(x.data, x.count, format_, low_, high_, y.data, threads, checked.error()));
  }

 private:
  lns_format format_;
  int64_t low_, high_;
};

class MaxPool : public Kernel {
 public:
  explicit MaxPool(const Node& node) : format_(format_of(node, "")), window_(window_of(node)) {}

  void run(const Run& run) const override {
    const Tensor x = run.input(0, "X");
    x.check_type(type_of(format_));
    int64_t size[3], out[3];
    spatial_sizes(x, window_, size);
    window_output(window_, size, out);
    for (int i = 0; i < 3; ++i) check_inside(i, size[i], out[i]);
    const Tensor y = run.output(windows_shape(x, x.shape[1], out), x.type);
    if (y.count == 0) return;
    Checked checked;
    checked(lns_max_pool(x.data, x.shape[0] * x.shape[1], size, format_, &window_, y.data, threads, checked.error()));
  }

 private:
  /* Padding never wins (spec 6.1), so every window needs an element; windows are boxes, so axes can be looked at one
   * by one, and the first element that is not before the axis decides. */
  void check_inside(int axis, int64_t size, int64_t out) const {
    const int64_t kernel = window_.kernel[axis], dilation = window_.dilations[axis];
    for (int64_t o = 0; o < out; ++o) {
      const int64_t start = o * window_.strides[axis] - window_.pads[axis];
      const int64_t first = start >= 0 ? 0 : (-start + dilation - 1) / dilation;
      if (first >= kernel || start + first * dilation >= size) {
        fail("a window of the max pooling holds padding only: use smaller pads");
      }
    }
  }

  lns_format format_;
  lns_window window_;
};

class Rescale : public Kernel {
 public:
  explicit Rescale(const Node& node) {
    desc_.input = format_of(node, "input");
    desc_.input_offset = node.integer("input_offset", -max_offset, max_offset);
    desc_.multiply = node.integer("multiply", 1, 1 << 24);
    desc_.divide = node.integer("divide", 1, 1 << 24);
    desc_.output_offset = node.integer("output_offset", -max_shift, max_shift);
    desc_.output = output_of(node);
    if (desc_.multiply != 1 && desc_.divide != 1) {
      fail("attributes multiply and divide are %lld and %lld: one of them is 1", static_cast<long long>(desc_.multiply),
           static_cast<long long>(desc_.divide));
    }
  }

  void run(const Run& run) const override {
    const Tensor x = run.input(0, "X");
    x.check_type(type_of(desc_.input));
    const Tensor y = run.output(x.shape, type_of(desc_.output.format));
    Checked checked;
    checked(lns_rescale(&desc_, x.data, x.count, y.data, threads, nullptr, checked.error()));
  }

 private:
  lns_rescale_desc desc_{};
};

class Add : public Kernel {
 public:
  explicit Add(const Node& node) : adder_(node) {
    desc_.a = format_of(node, "a");
    desc_.b = format_of(node, "b");
    desc_.a_shift = node.integer("a_shift", -max_shift, max_shift);
    desc_.b_shift = node.integer("b_shift", -max_shift, max_shift);
    desc_.code_shift = node.integer("code_shift", -max_shift, max_shift);
    desc_.output = output_of(node);
  }

  void run(const Run& run) const override {
    const Tensor a = run.input(0, "A"), b = run.input(1, "B");
    const Deltas deltas(run.input(2, "delta_plus"), run.input(3, "delta_minus"));
    a.check_type(type_of(desc_.a));
    b.check_type(type_of(desc_.b));
    const size_t rank = std::max(a.shape.size(), b.shape.size());
    const Shape a_shape = leading_ones(a.shape, rank), b_shape = leading_ones(b.shape, rank);
    Shape shape(rank);
    for (size_t i = 0; i < rank; ++i) {
      if (a_shape[i] != b_shape[i] && a_shape[i] != 1 && b_shape[i] != 1) {
        fail("A of shape %s and B of shape %s do not broadcast", text_of(a.shape).c_str(), text_of(b.shape).c_str());
      }
      shape[i] = a_shape[i] == 1 ? b_shape[i] : a_shape[i];
    }
    const Tensor y = run.output(shape, type_of(desc_.output.format));
    if (y.count == 0) return;
    const Axes axes(shape, a_shape, b_shape);
    lns_add_desc desc = desc_;
    desc.adder = adder_.with(deltas);
    Checked checked;
    checked(lns_add(&desc, axes.rank, axes.shape, a.data, axes.a, b.data, axes.b, y.data, threads, nullptr,
                    checked.error()));
  }

 private:
  static Shape leading_ones(const Shape& shape, size_t rank) {
    Shape made(rank - shape.size(), 1);
    made.insert(made.end(), shape.begin(), shape.end());
    return made;
  }

  /* Sizes and strides of the sum, with neighbouring axes that both operands walk alike merged into one. */
  struct Axes {
    int32_t rank = 0;
    int64_t shape[8], a[8], b[8];

    Axes(const Shape& sizes, const Shape& a_sizes, const Shape& b_sizes) {
      int64_t a_stride = 1, b_stride = 1;
      /* innermost first */
      for (size_t i = sizes.size(); i-- > 0;) {
        const int64_t size = sizes[i];
        if (size == 1) continue;
        const int64_t a_here = a_sizes[i] == 1 ? 0 : a_stride, b_here = b_sizes[i] == 1 ? 0 : b_stride;
        a_stride *= a_sizes[i];
        b_stride *= b_sizes[i];
        const int32_t last = rank - 1;
        if (rank > 0 && a_here == a[last] * shape[last] && b_here == b[last] * shape[last]) {
          shape[last] *= size;
          continue;
        }
        if (rank == 8) fail("A and B broadcast over more axes than 8");
        shape[rank] = size;
        a[rank] = a_here;
        b[rank] = b_here;
        ++rank;
      }
      std::reverse(shape, shape + rank);
      std::reverse(a, a + rank);
      std::reverse(b, b + rank);
    }
  };

  AdderAttributes adder_;
  lns_add_desc desc_{};
};

class AveragePool : public Kernel {
 public:
  explicit AveragePool(const Node& node) : adder_(node), window_(window_of(node)) {
    desc_.input = format_of(node, "input");
    desc_.input_shift = node.integer("input_shift", -max_shift, max_shift);
    desc_.code_shift = node.integer("code_shift", -max_shift, max_shift);
    desc_.lanes = static_cast<int32_t>(node.integer("lanes", 1, 1024));
    desc_.output = output_of(node);
  }

  void run(const Run& run) const override {
    const Tensor x = run.input(0, "X");
    const Deltas deltas(run.input(1, "delta_plus"), run.input(2, "delta_minus"));
    const Tensor log_counts = run.input(3, "log_counts");
    x.check_type(type_of(desc_.input));
    log_counts.check_type(ort::int64);
    int64_t size[3], out[3];
    spatial_sizes(x, window_, size);
    window_output(window_, size, out);
    lns_average_desc desc = desc_;
    bool fits = log_counts.rank() == 3;
    for (size_t i = 0; fits && i < 3; ++i) {
      desc.log_count_shape[i] = log_counts.shape[i];
      fits = log_counts.shape[i] == 1 || log_counts.shape[i] == out[i];
    }
    if (!fits) {
      fail("log_counts has shape %s, not %s or ones", text_of(log_counts.shape).c_str(),
           text_of(Shape(out, out + 3)).c_str());
    }
    check_range(log_counts, 0, max_shift);
    const Tensor y = run.output(windows_shape(x, x.shape[1], out), type_of(desc.output.format));
    if (y.count == 0) return;
    desc.adder = adder_.with(deltas);
    desc.log_counts = log_counts.as<int64_t>();
    Checked checked;
    checked(lns_average_pool(&desc, x.data, x.shape[0] * x.shape[1], size, &window_, y.data, threads, nullptr,
                             checked.error()));
  }

 private:
  AdderAttributes adder_;
  lns_window window_;
  lns_average_desc desc_{};
};

/* ------------------------------------------------------------------------------------------------------------
 * Registration */

/* One operator for one combination of types. */
struct Op : OrtCustomOp {
  const char* name;
  std::vector<int> inputs;
  int output; /* undefined if an attribute says it */
  Kernel* (*make)(const Node&);
};

const Op& op_of(const OrtCustomOp* op) { return *static_cast<const Op*>(op); }

template <class K>
Kernel* make_kernel(const Node& node) {
  return new K(node);
}

std::string described(const char* op, const std::string& node, const std::string& message) {
  return std::string("lnsdeploy.") + op + (node.empty() ? "" : " '" + node + "'") + ": " + message;
}

/* A status for whatever was thrown; nothing leaves it. */
template <class Body>
OrtStatus* guarded(const Host& host, const char* op, const std::string* node, Body body) noexcept {
  try {
    try {
      body();
      return nullptr;
    } catch (const Failure& failure) {
      return host.status(failure.code, described(op, node ? *node : "", failure.message).c_str());
    } catch (const std::bad_alloc&) {
      return host.status(ort::code_fail, described(op, node ? *node : "", "out of memory").c_str());
    } catch (const std::exception& error) {
      return host.status(ort::code_runtime_exception, described(op, node ? *node : "", error.what()).c_str());
    }
  } catch (...) {
    return host.status(ort::code_runtime_exception, "lnsdeploy: unknown failure");
  }
}

OrtStatus* LNS_ORT_CALL create_kernel(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info,
                                      void** out) noexcept {
  *out = nullptr;
  const Host host(api);
  std::string name;
  return guarded(host, op_of(op).name, &name, [&] {
    const Node node(host, info);
    name = node.name();
    std::unique_ptr<Kernel> kernel(op_of(op).make(node));
    kernel->op = op_of(op).name;
    kernel->node = name;
    kernel->host = host;
    kernel->threads = thread_count();
    *out = kernel.release();
  });
}

OrtStatus* LNS_ORT_CALL compute(void* opaque, OrtKernelContext* context) noexcept {
  const Kernel& kernel = *static_cast<const Kernel*>(opaque);
  return guarded(kernel.host, kernel.op, &kernel.node, [&] {
    kernel.run(Run(kernel.host, context));
    runs.fetch_add(1, std::memory_order_relaxed);
  });
}

/* ONNX Runtime calls the later versions of these two, which can fail. */
void* LNS_ORT_CALL create_kernel_v1(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*) noexcept {
  return nullptr;
}
void LNS_ORT_CALL compute_v1(void*, OrtKernelContext*) noexcept {}

void LNS_ORT_CALL destroy_kernel(void* kernel) noexcept { delete static_cast<Kernel*>(kernel); }
const char* LNS_ORT_CALL name_of_op(const OrtCustomOp* op) noexcept { return op_of(op).name; }
const char* LNS_ORT_CALL provider_of(const OrtCustomOp*) noexcept { return nullptr; }
int LNS_ORT_CALL input_type(const OrtCustomOp* op, size_t index) noexcept { return op_of(op).inputs[index]; }
size_t LNS_ORT_CALL input_count(const OrtCustomOp* op) noexcept { return op_of(op).inputs.size(); }
int LNS_ORT_CALL output_type(const OrtCustomOp* op, size_t) noexcept { return op_of(op).output; }
size_t LNS_ORT_CALL output_count(const OrtCustomOp*) noexcept { return 1; }
int LNS_ORT_CALL input_is(const OrtCustomOp*, size_t) noexcept { return ort::required; }
int LNS_ORT_CALL output_is(const OrtCustomOp* op, size_t) noexcept {
  return op_of(op).output == ort::undefined ? ort::optional : ort::required;
}
int LNS_ORT_CALL memory_of(const OrtCustomOp*, size_t) noexcept { return 0; }
int LNS_ORT_CALL one(const OrtCustomOp*) noexcept { return 1; }
int LNS_ORT_CALL last_version(const OrtCustomOp*) noexcept { return INT_MAX; }

class Registry {
 public:
  Registry() {
    using namespace ort;
    const int words[] = {uint8, uint16};
    add<Encode>("Encode", {float32, float32}, undefined);
    for (int x : words) {
      add<Decode>("Decode", {x, float32}, float32);
      add<Relu>("Relu", {x}, x);
      add<Clip>("Clip", {x}, x);
      add<MaxPool>("MaxPool", {x}, x);
      add<Rescale>("Rescale", {x}, undefined);
      add<AveragePool>("AveragePool", {x, int32, int32, int64}, undefined);
      for (int w : words) {
        add<Add>("Add", {x, w, int32, int32}, undefined);
        for (int acc : {int32, int64}) {
          add<Dot<false, false>>("LinearGemm", {x, w, acc, acc, int64, int64, int64}, undefined);
          add<Dot<false, true>>("LinearConv", {x, w, acc, acc, int64, int64, int64}, undefined);
        }
        for (int acc : {int32, int64}) add<MatMul<false>>("LinearMatMul", {x, w, acc, int64, int64}, undefined);
        add<MatMul<true>>("LogMatMul", {x, w, int32, int32, int64}, undefined);
        add<Dot<true, false>>("LogGemm", {x, w, int64, int32, int32, int64, int64}, undefined);
        add<Dot<true, true>>("LogConv", {x, w, int64, int32, int32, int64, int64}, undefined);
      }
    }
  }

  /* The domain as one ONNX Runtime knows it. Sessions refer to it without owning it, and the last one's end is not
   * known: it is never released. */
  OrtCustomOpDomain* domain(const Host& host) {
    const std::lock_guard<std::mutex> lock(mutex_);
    OrtCustomOpDomain*& known = domains_[host.api()];
    if (known == nullptr) {
      struct Release {
        const OrtApi* api;
        void operator()(OrtCustomOpDomain* p) const { ort::get<ort::ReleaseCustomOpDomain>(api)(p); }
      };
      OrtCustomOpDomain* made = nullptr;
      host.call<ort::CreateCustomOpDomain>("lnsdeploy", &made);
      std::unique_ptr<OrtCustomOpDomain, Release> domain(made, Release{host.api()});
      for (const std::unique_ptr<Op>& op : ops_) {
        host.call<ort::CustomOpDomainAdd>(made, static_cast<const OrtCustomOp*>(op.get()));
      }
      known = domain.release();
    }
    return known;
  }

 private:
  template <class K>
  void add(const char* name, std::vector<int> inputs, int output) {
    std::unique_ptr<Op> op(new Op());
    op->version = ort::api_version;
    op->CreateKernel = create_kernel_v1;
    op->GetName = name_of_op;
    op->GetExecutionProviderType = provider_of;
    op->GetInputType = input_type;
    op->GetInputTypeCount = input_count;
    op->GetOutputType = output_type;
    op->GetOutputTypeCount = output_count;
    op->KernelCompute = compute_v1;
    op->KernelDestroy = destroy_kernel;
    op->GetInputCharacteristic = input_is;
    op->GetOutputCharacteristic = output_is;
    op->GetInputMemoryType = memory_of;
    op->GetVariadicInputMinArity = one;
    op->GetVariadicInputHomogeneity = one;
    op->GetVariadicOutputMinArity = one;
    op->GetVariadicOutputHomogeneity = one;
    op->CreateKernelV2 = create_kernel;
    op->KernelComputeV2 = compute;
    op->GetStartVersion = one;
    op->GetEndVersion = last_version;
    op->name = name;
    op->inputs = std::move(inputs);
    op->output = output;
    op->make = make_kernel<K>;
    ops_.push_back(std::move(op));
  }

  std::vector<std::unique_ptr<Op>> ops_;
  std::mutex mutex_;
  std::map<const OrtApi*, OrtCustomOpDomain*> domains_;
};

/* Never destroyed: at the end of a process sessions may outlive it. */
Registry& registry() {
  static Registry* const made = new Registry();
  return *made;
}

}  // namespace

extern "C" {

/* Computations of custom operators that this library has done in this process. */
LNS_API int64_t lns_ort_runs(void) { return runs.load(std::memory_order_relaxed); }

/* What ONNX Runtime calls when the library is registered with a session's options. */
LNS_API OrtStatus* LNS_ORT_CALL RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ort::api_version);
  if (api == nullptr) {
    /* only the first version's functions are certain */
    const OrtApi* first = base->GetApi(1);
    if (first == nullptr) return nullptr;
    char text[160];
    const char* version = base->GetVersionString();
    std::snprintf(text, sizeof text, "lnsdeploy: ONNX Runtime %.32s is too old for these operators: use 1.18 or later",
                  version == nullptr ? "(unknown)" : version);
    return Host(first).status(ort::code_not_implemented, text);
  }
  const Host host(api);
  return guarded(host, "RegisterCustomOps", nullptr,
                 [&] { host.call<ort::AddCustomOpDomain>(options, registry().domain(host)); });
}

}  // extern "C"
