#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "elastic_deform/operands.h"

// The displacement field on the CPU: its coefficients, and its polynomials along output rows.
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

/// The field along an output row. Rows of one cell share their patches.
struct Strip {
  int64_t image = -1, cell = -1;
  double t = 0;
  std::vector<Patch> patches[2];  // for each component, one for each piece
};

/// The motions and fields of all images.
class Field {
 public:
  /// Pieces end at the borders of grid cells, and at multiples of `longest`.
  Field(const Operands& in, const Settings& settings, int64_t output_columns, int64_t longest)
      : in_(in), grid_(settings.grid) {
    const Values affine = in.values(in.affine), offset = in.values(in.offset);
    for (int64_t n = 0; n < in.images; ++n) {
      motions_.push_back(Motion::of(affine, offset, settings.spans_input, n));
      coefficients_.push_back(expand(n));
      if (n == 0 || motions_[n].shift[1] != motions_[0].shift[1]) {
        pieces_.push_back(cut(motions_[n].shift[1], output_columns, longest));
      } else {
        pieces_.push_back(pieces_[0]);
      }
    }
  }

  const Motion& motion(int64_t image) const { return motions_[image]; }
  const std::vector<Piece>& pieces(int64_t image) const { return pieces_[image]; }

  /// Moves a strip to an output row.
  void move_to(int64_t image, int64_t row, Strip& strip) const {
    const double g = in_.rows.coordinate(static_cast<double>(row) + motions_[image].shift[0]);
    const int64_t cell = in_.rows.cell(g);
    strip.t = g - static_cast<double>(cell);
    if (strip.image == image && strip.cell == cell) return;
    strip.image = image;
    strip.cell = cell;
    const int64_t columns = in_.columns.size();
    std::vector<Cubic<double>> down(columns);
    for (int axis = 0; axis < 2; ++axis) {
      const double* const c =
          coefficients_[image].data() + axis * in_.coefficients() + cell * columns;
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

  /// Computes the derivatives with respect to the displacements, (N, 2, P, Q), from those with
  /// respect to the coefficients along output rows, (N, output_rows, 2, columns).
  void gradient(const std::vector<double>& along, int64_t output_rows, double* result) const {
    const int64_t rows = in_.rows.size(), columns = in_.columns.size();
    for (int64_t n = 0; n < in_.images; ++n) {
      std::vector<double> coefficients(2 * rows * columns);
      for (int64_t y = 0; y < output_rows; ++y) {
        const double g = in_.rows.coordinate(static_cast<double>(y) + motions_[n].shift[0]);
        const int64_t cell = in_.rows.cell(g);
        const double* const line = along.data() + (n * output_rows + y) * 2 * columns;
        for (int axis = 0; axis < 2; ++axis) {
          for (int i = 0; i < 4; ++i) {
            const double weight = cubic_weight(grid_, i, g - static_cast<double>(cell));
            double* const to = coefficients.data() + (axis * rows + cell + i) * columns;
            for (int64_t x = 0; x < columns; ++x) to[x] += weight * line[axis * columns + x];
          }
        }
      }
      collect(coefficients.data(), motions_[n],
              result + n * 2 * in_.points.rows * in_.points.columns);
    }
  }

 private:
  /// The transpose of `expand`.
  void collect(const double* coefficients, const Motion& motion, double* result) const {
    const auto [rows, columns] = in_.points;
    std::fill_n(result, 2 * rows * columns, 0.0);
    for (int64_t y = 0; y < in_.rows.size(); ++y) {
      for (int64_t x = 0; x < in_.columns.size(); ++x) {
        const int64_t to = knot_of(grid_, y, x, in_.points);
        const int64_t from = y * in_.columns.size() + x;
        for (int axis = 0; axis < 2; ++axis) {
          result[axis * rows * columns + to] += motion.moved_transposed(
              grid_, axis, coefficients[from], coefficients[in_.coefficients() + from]);
        }
      }
    }
    for (int axis = 0; axis < 2 && grid_ == kInterpolating; ++axis) {
      double* const d = result + axis * rows * columns;
      for (int64_t x = 0; x < columns; ++x) prefilter_transposed(d + x, rows, columns);
      for (int64_t y = 0; y < rows; ++y) prefilter_transposed(d + y * columns, columns, 1);
    }
  }

  std::vector<double> expand(int64_t image) const {
    std::vector<double> result(2 * in_.coefficients());
    if (!in_.displacement) return result;
    const auto [rows, columns] = in_.points;
    const Values displacement = in_.values(in_.displacement);
    std::vector<double> knots(2 * rows * columns);
    for (size_t i = 0; i < knots.size(); ++i) knots[i] = displacement[image * knots.size() + i];
    for (int axis = 0; axis < 2 && grid_ == kInterpolating; ++axis) {
      double* const d = knots.data() + axis * rows * columns;
      for (int64_t y = 0; y < rows; ++y) prefilter(d + y * columns, columns, 1);
      for (int64_t x = 0; x < columns; ++x) prefilter(d + x, rows, columns);
    }
    for (int axis = 0; axis < 2; ++axis) {
      for (int64_t y = 0; y < in_.rows.size(); ++y) {
        for (int64_t x = 0; x < in_.columns.size(); ++x) {
          const int64_t from = knot_of(grid_, y, x, in_.points);
          result[(axis * in_.rows.size() + y) * in_.columns.size() + x] =
              motions_[image].moved(grid_, axis, knots[from], knots[rows * columns + from]);
        }
      }
    }
    return result;
  }

  std::vector<Piece> cut(double shift, int64_t columns, int64_t longest) const {
    std::vector<Piece> pieces;
    int64_t before = -1;
    for (int64_t x = 0; x < columns; ++x) {
      const int64_t run = in_.columns.run(static_cast<double>(x) + shift);
      if (x % longest != 0 && run == before) {
        ++pieces.back().end;
        continue;
      }
      before = run;
      pieces.push_back({x, x + 1, 0, 0, 0});
    }
    for (Piece& piece : pieces) {
      const double at = static_cast<double>(piece.middle()) + shift;
      const double g = in_.columns.coordinate(at);
      piece.cell = in_.columns.cell(g);
      piece.t = g - static_cast<double>(piece.cell);
      // Beyond the grid the field is constant.
      piece.scale = g == at * in_.columns.scale ? in_.columns.scale : 0.0;
    }
    return pieces;
  }

  const Operands& in_;
  int32_t grid_;
  std::vector<Motion> motions_;
  std::vector<std::vector<double>> coefficients_;
  std::vector<std::vector<Piece>> pieces_;
};

}  // namespace unet_fast::elastic_deform
