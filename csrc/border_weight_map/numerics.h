#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "common/host_device.h"

// Squared distances to the nearest and the second nearest of different objects.
//
// The transform is separable: along one axis after the other, every position keeps the two nearest
// different objects of the lines seen so far. Two suffice, because a step along the next axis adds
// the same to all distances of a line: an object that is third there is third from everywhere.
namespace unet_fast::border_weight_map {

/// Farther than anything. Half the range, so that adding a squared distance does not overflow.
template <typename D>
constexpr D kFar =
    std::is_integral_v<D> ? std::numeric_limits<D>::max() / 2 : std::numeric_limits<D>::infinity();

/// The two nearest different objects so far. D: int32_t where all squared distances are integers
/// below kFar, else double.
template <typename D>
struct Nearest {
  D first, second;              // squared distances
  int32_t label, second_label;  // of the objects; any where the distance is kFar

  /// Takes in an object at squared distance d. Without branches, so that loops over it vectorise.
  UNET_FAST_HOST_DEVICE void add(D d, int32_t object) {
    const bool nearer = d < first;
    const bool replaces = object != label && (nearer || d < second);
    second = replaces ? (nearer ? first : d) : second;
    second_label = replaces ? (nearer ? label : object) : second_label;
    label = nearer ? object : label;
    first = nearer ? d : first;
  }
};

}  // namespace unet_fast::border_weight_map
