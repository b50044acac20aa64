#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "elastic_deform/operands.h"

// The displacement field on the CPU: its coefficients, and its polynomials along output lines,
// which run along the last axis. A plane of the last two axes, in a volume too, has coefficients of
// its own: the values of the volume's cubics along the first axis.
namespace unet_fast::elastic_deform {

/// A run of output columns over which the field is one polynomial.
struct Piece {
  int64_t begin, end;
  int64_t cell;
  double t, scale;  // place in the cell at column middle(), and change per column

  int64_t middle() const { return begin + (end - begin) / 2; }
};

/// One component of the field over a piece and one cell of the rows: a polynomial of the distance
/// to the piece's middle in pixels, whose coefficients are polynomials of the row's place in the
/// cell.
struct Patch {
  Cubic<double> powers[4];  // one for each power of the row's place

  Cubic<double> at(double t) const {
    Cubic<double> result;
    for (int k = 0; k < 4; ++k) {
      result.at[k] =
          ((powers[3].at[k] * t + powers[2].at[k]) * t + powers[1].at[k]) * t + powers[0].at[k];
    }
    return result;
  }
};

/// The field along an output line. Lines of one plane and one cell of the rows share their patches.
template <int axes>
struct Strip {
  int64_t image = -1, plane = -1, cell = -1;
  double t = 0;
  std::vector<Patch> patches[axes];  // for each component, one for each piece
};

/// The motions and fields of all images.
template <int axes>
class Field {
 public:
  /// Pieces end at the borders of grid cells, and at multiples of `longest`.
  Field(const Operands<axes>& in, const Settings& settings, int64_t output_columns, int64_t longest)
      : in_(in), grid_(settings.grid), sizes_(in.field.sizes()) {
    const Values affine = in.values(in.affine), offset = in.values(in.offset);
    for (int64_t n = 0; n < in.images; ++n) {
      motions_.push_back(Motion<axes>::of(affine, offset, settings.spans_input, n));
      coefficients_.push_back(expand(n));
      const double shift = motions_[n].shift[kAcross];
      if (n == 0 || shift != motions_[0].shift[kAcross]) {
        pieces_.push_back(cut(shift, output_columns, longest));
      } else {
        pieces_.push_back(pieces_[0]);
      }
    }
  }

  const Motion<axes>& motion(int64_t image) const { return motions_[image]; }
  const std::vector<Piece>& pieces(int64_t image) const { return pieces_[image]; }

  /// Moves a strip to the output line that starts at a place.
  void move_to(int64_t image, const Sides<axes>& place, Strip<axes>& strip) const {
    const auto [cell, t] = find(image, place, kDown);
    strip.t = t;
    const int64_t plane = axes == 2 ? 0 : place[0];
    if (strip.image == image && strip.plane == plane && strip.cell == cell) return;
    strip.image = image;
    strip.plane = plane;
    strip.cell = cell;
    const int64_t columns = sizes_[kAcross];
    std::vector<Cubic<double>> down(columns);
    std::vector<double> rows;
    for (int axis = 0; axis < axes; ++axis) {
      const double* c = coefficients_[image].data() + axis * sizes_.pixels() + cell * columns;
      if constexpr (axes == 3) c = evaluate(c, find(image, place, 0), rows);
      for (int64_t k = 0; k < columns; ++k) {
        down[k] = cubic(grid_, c[k], c[columns + k], c[2 * columns + k], c[3 * columns + k]);
      }
      strip.patches[axis].clear();
      for (const Piece& piece : pieces_[image]) {
        const Cubic<double>* const d = down.data() + piece.cell;
        Patch patch;
        for (int m = 0; m < 4; ++m) {
          patch.powers[m] =
              cubic(grid_, d[0].at[m], d[1].at[m], d[2].at[m], d[3].at[m]).of(piece.t, piece.scale);
        }
        strip.patches[axis].push_back(patch);
      }
    }
  }

  /// Computes the derivatives with respect to the displacements, (N, axes, points), from those with
  /// respect to the coefficients along output lines, (N, lines, axes, columns).
  void gradient(const std::vector<double>& along, const Sides<axes>& output, double* result) const {
    const int64_t columns = sizes_[kAcross], size = sizes_.pixels();
    for (int64_t n = 0; n < in_.images; ++n) {
      std::vector<double> coefficients(axes * size);
      for (int64_t i = 0; i < output.lines(); ++i) {
        const Sides<axes> place = output.place_of(i * output[kAcross]);
        const double* const line = along.data() + (n * output.lines() + i) * axes * columns;
        spread(n, place, 0, 1.0, 0, [&](int64_t first, double weight) {
          for (int axis = 0; axis < axes; ++axis) {
            double* const to = coefficients.data() + axis * size + first;
            for (int64_t x = 0; x < columns; ++x) to[x] += weight * line[axis * columns + x];
          }
        });
      }
      collect(coefficients.data(), motions_[n], result + n * axes * in_.field.points.pixels());
    }
  }

 private:
  static constexpr int kDown = axes - 2, kAcross = axes - 1;

  struct Spot {
    int64_t cell;
    double t;
  };

  // Where on the grid an output pixel lies along an axis.
  Spot find(int64_t image, const Sides<axes>& place, int axis) const {
    const GridAxis& along = in_.field[axis];
    const double g =
        along.coordinate(static_cast<double>(place[axis]) + motions_[image].shift[axis]);
    const int64_t cell = along.cell(g);
    return {cell, g - static_cast<double>(cell)};
  }

  // Four rows of a plane's coefficients, from those of the volume.
  const double* evaluate(const double* c, Spot spot, std::vector<double>& rows) const {
    const int64_t step = sizes_.step(0);
    c += spot.cell * step;
    rows.resize(4 * sizes_[kAcross]);
    for (size_t i = 0; i < rows.size(); ++i) {
      rows[i] = cubic(grid_, c[i], c[step + i], c[2 * step + i], c[3 * step + i])(spot.t);
    }
    return rows.data();
  }

  // Calls `fn(first, weight)` for the lines of coefficients that an output line depends on.
  template <typename Fn>
  void spread(int64_t image, const Sides<axes>& place, int axis, double weight, int64_t first,
              Fn&& fn) const {
    if (axis == kAcross) return fn(first, weight);
    const auto [cell, t] = find(image, place, axis);
    for (int i = 0; i < 4; ++i) {
      spread(image, place, axis + 1, weight * cubic_weight(grid_, i, t),
             first + (cell + i) * sizes_.step(axis), fn);
    }
  }

  // The transpose of `expand`.
  void collect(const double* coefficients, const Motion<axes>& motion, double* result) const {
    const Sides<axes>& points = in_.field.points;
    const int64_t size = sizes_.pixels();
    std::fill_n(result, axes * points.pixels(), 0.0);
    for (int64_t i = 0; i < size; ++i) {
      const int64_t to = in_.field.knot_of(sizes_.place_of(i));
      for (int axis = 0; axis < axes; ++axis) {
        result[axis * points.pixels() + to] +=
            motion.moved_transposed(grid_, axis, coefficients + i, size);
      }
    }
    for (int axis = 0; axis < axes && grid_ == kInterpolating; ++axis) {
      for (int64_t line = 0; line < axes * points.lines_along(axis); ++line) {
        prefilter_transposed(result + points.first_of_line(axis, line), points[axis],
                             points.step(axis));
      }
    }
  }

  std::vector<double> expand(int64_t image) const {
    const Sides<axes>& points = in_.field.points;
    const int64_t size = sizes_.pixels();
    std::vector<double> result(axes * size);
    if (!in_.displacement) return result;
    const Values displacement = in_.values(in_.displacement);
    std::vector<double> knots(axes * points.pixels());
    for (size_t i = 0; i < knots.size(); ++i) knots[i] = displacement[image * knots.size() + i];
    for (int axis = kAcross; axis >= 0 && grid_ == kInterpolating; --axis) {
      for (int64_t line = 0; line < axes * points.lines_along(axis); ++line) {
        prefilter(knots.data() + points.first_of_line(axis, line), points[axis], points.step(axis));
      }
    }
    for (int64_t i = 0; i < size; ++i) {
      const double* const from = knots.data() + in_.field.knot_of(sizes_.place_of(i));
      for (int axis = 0; axis < axes; ++axis) {
        result[axis * size + i] = motions_[image].moved(grid_, axis, from, points.pixels());
      }
    }
    return result;
  }

  std::vector<Piece> cut(double shift, int64_t columns, int64_t longest) const {
    const GridAxis& axis = in_.field[kAcross];
    std::vector<Piece> pieces;
    int64_t before = -1;
    for (int64_t x = 0; x < columns; ++x) {
      const int64_t run = axis.run(static_cast<double>(x) + shift);
      if (x % longest != 0 && run == before) {
        ++pieces.back().end;
        continue;
      }
      before = run;
      pieces.push_back({x, x + 1, 0, 0, 0});
    }
    for (Piece& piece : pieces) {
      const double at = static_cast<double>(piece.middle()) + shift;
      const double g = axis.coordinate(at);
      piece.cell = axis.cell(g);
      piece.t = g - static_cast<double>(piece.cell);
      // Beyond the grid the field is constant.
      piece.scale = g == at * axis.scale ? axis.scale : 0.0;
    }
    return pieces;
  }

  const Operands<axes>& in_;
  int32_t grid_;
  Sides<axes> sizes_;  // numbers of coefficients
  std::vector<Motion<axes>> motions_;
  std::vector<std::vector<double>> coefficients_;
  std::vector<std::vector<Piece>> pieces_;
};

}  // namespace unet_fast::elastic_deform
