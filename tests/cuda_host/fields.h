// The fields of an argument struct, read from a call by their names.
#pragma once

#include <algorithm>
#include <string>
#include <type_traits>

#include "protocol.h"

namespace cuda_host {

template <class T>
void read_field(const Call& call, const std::string& key, T& field) {
  if constexpr (std::is_pointer_v<T>) {
    field = call.array<std::remove_const_t<std::remove_pointer_t<T>>>(key);
  } else if constexpr (std::is_floating_point_v<T>) {
    field = T(call.real(key));
  } else {
    field = static_cast<T>(call.integer(key));
  }
}

// `names` as a macro stringises its arguments: "a, b.c"; the key of b.c is c.
template <class... T>
void read_fields(const Call& call, const std::string& names, T&... fields) {
  size_t begin = 0;
  const auto next = [&] {
    const size_t end = std::min(names.find(',', begin), names.size());
    const std::string name = names.substr(begin, end - begin);
    begin = std::min(end + 2, names.size());
    return name.substr(name.rfind('.') + 1);
  };
  (read_field(call, next(), fields), ...);
}

}  // namespace cuda_host

// Reads the listed fields; for use in a struct that derives from the argument struct.
#define FIELDS(call, ...) ::cuda_host::read_fields(call, #__VA_ARGS__, __VA_ARGS__)
