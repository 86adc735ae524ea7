//! Views of device memory that launchers take: an address with a shape, for as long as the memory is lent.
//!
//! A view borrows the tensor, [`Buffer`](super::Buffer) or [`Arena`](super::Arena) that owns its memory, so that nothing is
//! launched on memory that has been given back:
//!
//! ```no_run
//! # use candle_core::{DType, Tensor};
//! # use trainer::{device::{self, matrix}, kernels::cuda::fill};
//! # fn main() -> Result<(), device::Error> {
//! let gpu = device::open(0)?;
//! let tensor: Tensor = device::empty(&gpu, (16, 64), DType::F32)?;
//! let view = matrix(&tensor)?;
//! fill(&gpu, view, 1.0)?;
//! drop(tensor);
//! # Ok(())
//! # }
//! ```
//!
//! The last two lines in the other order do not compile:
//!
//! ```compile_fail,E0505
//! # use candle_core::{DType, Tensor};
//! # use trainer::{device::{self, matrix}, kernels::cuda::fill};
//! # fn main() -> Result<(), device::Error> {
//! let gpu = device::open(0)?;
//! let tensor: Tensor = device::empty(&gpu, (16, 64), DType::F32)?;
//! let view = matrix(&tensor)?;
//! drop(tensor);
//! fill(&gpu, view, 1.0)?;
//! # Ok(())
//! # }
//! ```
//!
//! The memory may be freed before the work has been done, for it is freed in the order of the queue that does the work.

use std::marker::PhantomData;
use std::ops::Range;

use candle_core::{DType, Tensor};

use super::{Error, argument, gpu};

/// A matrix on the device: contiguous columns, rows `stride` elements apart.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'b> {
    pub(crate) address: u64,
    pub(crate) dtype: DType,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    /// Elements from one row to the next.
    pub(crate) stride: usize,
    pub(crate) lent: PhantomData<&'b ()>,
}

/// A flat array on the device.
#[derive(Clone, Copy, Debug)]
pub struct Pointer<'b> {
    pub(crate) address: u64,
    pub(crate) dtype: DType,
    pub(crate) len: usize,
    pub(crate) lent: PhantomData<&'b ()>,
}

impl<'b> Pointer<'b> {
    /// The first `rows` times `cols` elements as a matrix.
    ///
    /// # Panics
    /// If there are fewer.
    #[must_use]
    pub fn as_matrix(self, (rows, cols): (usize, usize)) -> Matrix<'b> {
        assert!(rows * cols <= self.len, "[{rows}, {cols}] of {} elements", self.len);
        matrix_at(self.address, (rows, cols), self.dtype)
    }

    /// The type of the elements.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Elements from `first` on.
    ///
    /// # Panics
    /// If there are fewer.
    #[must_use]
    pub fn from_element(self, first: usize) -> Self {
        self.elements(first..self.len)
    }

    /// The elements `range`.
    ///
    /// # Panics
    /// If they are not among these.
    #[must_use]
    pub fn elements(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len, "elements {range:?} of {}", self.len);
        let first_byte = range.start * self.dtype.size_in_bytes();
        Self { address: self.address + first_byte as u64, len: range.len(), ..self }
    }
}

impl<'b> Matrix<'b> {
    /// Columns `first .. first + cols` of every row.
    ///
    /// # Panics
    /// If there are fewer.
    #[must_use]
    pub fn columns(self, first: usize, cols: usize) -> Self {
        assert!(first + cols <= self.cols, "columns {first}+{cols} of {}", self.cols);
        Self { address: self.address + (first * self.dtype.size_in_bytes()) as u64, cols, ..self }
    }

    /// Rows `first .. first + rows`.
    ///
    /// # Panics
    /// If there are fewer.
    #[must_use]
    pub fn rows(self, first: usize, rows: usize) -> Self {
        assert!(first + rows <= self.rows, "rows {first}+{rows} of {}", self.rows);
        Self { address: self.address + (first * self.stride * self.dtype.size_in_bytes()) as u64, rows, ..self }
    }

    /// The type of the values.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Number of rows and of columns.
    pub fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// Matrices that lie side by side as one; `None` if they do not, or there are none.
    pub fn joined(parts: &[Matrix<'b>]) -> Option<Matrix<'b>> {
        let is_one = parts.windows(2).all(|pair| pair[0].is_followed_by(&pair[1]));
        let first = parts.first().filter(|_| is_one)?;
        Some(Self { cols: parts.iter().map(|part| part.cols).sum(), ..*first })
    }

    /// Whether `next` continues each row of this matrix, so that both are columns of one.
    fn is_followed_by(&self, next: &Self) -> bool {
        let end = self.address + (self.cols * self.dtype.size_in_bytes()) as u64;
        self.dtype == next.dtype && self.rows == next.rows && self.stride == next.stride && end == next.address
    }
}

/// A float tensor as a matrix: a vector is one row, higher ranks are rows of their last dimension.
///
/// # Errors
/// If it is not a float tensor on a GPU with contiguous columns and evenly spaced rows.
pub fn matrix(tensor: &Tensor) -> Result<Matrix<'_>, Error> {
    let refused = || argument("view", "tensor", (tensor.dtype(), tensor.layout()), "float rows on a GPU");
    if !matches!(tensor.dtype(), DType::F32 | DType::F16 | DType::BF16) {
        return Err(refused());
    }
    let (rows, cols, stride) = match (tensor.dims(), tensor.stride()) {
        ([], _) => (1, 1, 1),
        (&[n], &[step]) if step == 1 || n <= 1 => (1, n, n),
        (&[rows, cols], &[stride, step]) if step == 1 || cols <= 1 => (rows, cols, stride),
        (dims, _) if tensor.is_contiguous() => {
            let cols = dims.last().copied().unwrap_or(1);
            (tensor.elem_count() / cols.max(1), cols, cols)
        }
        _ => return Err(refused()),
    };
    let stride = if rows <= 1 { stride.max(cols) } else { stride };
    Ok(Matrix { address: gpu::address(tensor)?, dtype: tensor.dtype(), rows, cols, stride, lent: PhantomData })
}

/// A contiguous tensor of any type as a flat array.
///
/// # Errors
/// If it is not contiguous or not on a GPU.
pub fn array(tensor: &Tensor) -> Result<Pointer<'_>, Error> {
    if !tensor.is_contiguous() {
        return Err(argument("view", "tensor", tensor.layout(), "contiguous values"));
    }
    Ok(Pointer { address: gpu::address(tensor)?, dtype: tensor.dtype(), len: tensor.elem_count(), lent: PhantomData })
}

/// A matrix at an address, rows one behind the other, for as long as the caller says.
pub(super) fn matrix_at<'b>(address: u64, (rows, cols): (usize, usize), dtype: DType) -> Matrix<'b> {
    Matrix { address, dtype, rows, cols, stride: cols, lent: PhantomData }
}

/// An array at an address, for as long as the caller says.
pub(super) fn array_at<'b>(address: u64, dtype: DType, len: usize) -> Pointer<'b> {
    Pointer { address, dtype, len, lent: PhantomData }
}

#[cfg(test)]
mod tests {
    use std::marker::PhantomData;

    use candle_core::DType;

    use super::{Matrix, Pointer};

    fn whole() -> Matrix<'static> {
        Matrix { address: 1024, dtype: DType::BF16, rows: 4, cols: 24, stride: 32, lent: PhantomData }
    }

    #[test]
    fn parts_of_a_matrix_begin_where_their_first_value_lies() {
        let part = whole().rows(1, 2).columns(8, 16);
        assert_eq!((part.address, part.rows, part.cols, part.stride), (1024 + 2 * (32 + 8), 2, 16, 32));
        let array = Pointer { address: 64, dtype: DType::F32, len: 10, lent: PhantomData };
        assert_eq!((array.elements(3..5).address, array.from_element(3).len), (76, 7));
        let matrix = array.from_element(2).as_matrix((2, 4));
        assert_eq!((matrix.address, matrix.shape(), matrix.stride, matrix.dtype), (72, (2, 4), 4, DType::F32));
    }

    #[test]
    fn columns_are_joined_only_where_they_lie_side_by_side() {
        let (left, middle, right) = (whole().columns(0, 8), whole().columns(8, 4), whole().columns(12, 12));
        let joined = Matrix::joined(&[left, middle, right]).unwrap();
        assert_eq!((joined.address, joined.cols, joined.rows, joined.stride), (1024, 24, 4, 32));
        assert!(Matrix::joined(&[left, right]).is_none());
        assert!(Matrix::joined(&[middle, left]).is_none());
        assert!(Matrix::joined(&[left, Matrix { stride: 40, ..middle }]).is_none());
        assert!(Matrix::joined(&[]).is_none());
    }

    #[test]
    #[should_panic(expected = "columns 16+16 of 24")]
    fn a_view_does_not_grow() {
        let _ = whole().columns(16, 16);
    }
}
