// Reads calls from a file and writes their results to another; tests/cuda_host/run.py is the other end.
#pragma once

#include <cstdint>
#include <cstdio>
#include <map>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

namespace cuda_host {

// Memory of exactly the requested size, aligned as by a GPU's allocator, so that a sanitizer detects an access one byte
// beyond it.
class Array {
 public:
  Array() = default;
  explicit Array(size_t bytes) : bytes_(bytes), data_(::operator new(bytes, std::align_val_t(256))) {}
  Array(Array&& other) noexcept : offset(other.offset), bytes_(other.bytes_), data_(other.data_) {
    other.data_ = nullptr;
  }
  Array(const Array&) = delete;
  ~Array() {
    if (data_ != nullptr) ::operator delete(data_, std::align_val_t(256));
  }
  size_t bytes() const { return bytes_; }
  void* data() const { return data_; }
  size_t offset = 0;  // bytes before the first element that the launcher is given
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  size_t bytes_ = 0;
  void* data_ = nullptr;
};

struct Call {
  std::string name;
  std::map<std::string, int64_t> ints;
  std::map<std::string, double> reals;
  std::vector<std::string> order;  // names of the arrays
  std::map<std::string, Array> arrays;

  int64_t integer(const std::string& key) const { return ints.at(key); }
  double real(const std::string& key) const { return reals.at(key); }
  template <class T = void>
  T* array(const std::string& key) const {  // null if the call has none
    const auto found = arrays.find(key);
    if (found == arrays.end()) return nullptr;
    return reinterpret_cast<T*>(found->second.as<char>() + found->second.offset);
  }
};

class File {
 public:
  File(const char* path, const char* mode) : file_(std::fopen(path, mode)) {
    if (file_ == nullptr) throw std::runtime_error(std::string("cannot open ") + path);
  }
  ~File() { std::fclose(file_); }
  void read(void* data, size_t bytes) {
    if (bytes > 0 && std::fread(data, 1, bytes, file_) != bytes) throw std::runtime_error("the calls end early");
  }
  void write(const void* data, size_t bytes) {
    if (bytes > 0 && std::fwrite(data, 1, bytes, file_) != bytes) throw std::runtime_error("cannot write the results");
  }
  template <class T>
  T value() {
    T result;
    read(&result, sizeof(T));
    return result;
  }
  template <class T>
  void put(T value) {
    write(&value, sizeof(T));
  }
  std::string text() {
    std::string result(value<uint32_t>(), '\0');
    read(result.data(), result.size());
    return result;
  }
  void put_text(const std::string& text) {
    put(uint32_t(text.size()));
    write(text.data(), text.size());
  }

 private:
  std::FILE* file_;
};

inline Call read_call(File& file) {
  Call call;
  call.name = file.text();
  for (auto left = file.value<uint32_t>(); left > 0; --left) {
    const std::string key = file.text();
    call.ints[key] = file.value<int64_t>();
  }
  for (auto left = file.value<uint32_t>(); left > 0; --left) {
    const std::string key = file.text();
    call.reals[key] = file.value<double>();
  }
  for (auto left = file.value<uint32_t>(); left > 0; --left) {
    const std::string key = file.text();
    Array array(file.value<uint64_t>());
    array.offset = file.value<uint64_t>();
    file.read(array.data(), array.bytes());
    call.order.push_back(key);
    call.arrays.emplace(key, std::move(array));
  }
  return call;
}

inline void write_result(File& file, const Call& call, const std::string& error, const std::vector<int64_t>& launched) {
  file.put_text(error);
  file.put(uint32_t(launched.size()));
  file.write(launched.data(), launched.size() * sizeof(int64_t));
  for (const std::string& key : call.order) {
    const Array& array = call.arrays.at(key);
    file.write(array.data(), array.bytes());
  }
}

}  // namespace cuda_host
