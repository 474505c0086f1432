//! Where a convolution reads and writes: images with zeros around them, and regular walks over their pixels.

/// An image with zeros around it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Padded {
    /// The image inside.
    pub h: usize,
    pub w: usize,
    pub c: usize,
    /// Zero rows above and columns to the left.
    pub top: usize,
    pub left: usize,
    /// Rows and columns altogether.
    pub rows: usize,
    pub cols: usize,
}

impl Padded {
    /// An image of `[h][w][c]` without anything around it.
    pub(crate) fn none([h, w, c]: [usize; 3]) -> Self {
        Self::new([h, w, c], [0; 4])
    }

    pub(crate) fn new([h, w, c]: [usize; 3], [top, bottom, left, right]: [usize; 4]) -> Self {
        Self { h, w, c, top, left, rows: top + h + bottom, cols: left + w + right }
    }

    /// Adds zero rows below and columns to the right until there are at least so many.
    pub(crate) fn reach(&mut self, rows: usize, cols: usize) {
        (self.rows, self.cols) = (self.rows.max(rows), self.cols.max(cols));
    }

    /// Whether there is nothing around the image.
    pub(crate) fn plain(&self) -> bool {
        self.rows == self.h && self.cols == self.w
    }

    /// Floats of the whole.
    pub(crate) fn len(&self) -> usize {
        self.rows * self.cols * self.c
    }

    /// Floats of the image inside.
    pub(crate) fn image(&self) -> usize {
        self.h * self.w * self.c
    }

    /// Where the image's first pixel is.
    pub(crate) fn origin(&self) -> usize {
        (self.top * self.cols + self.left) * self.c
    }

    /// Floats from one row to the next.
    pub(crate) fn row(&self) -> usize {
        self.cols * self.c
    }

    /// Row `y` of the image inside `whole`.
    pub(crate) fn row_of<'a>(&self, whole: &'a mut [f32], y: usize) -> &'a mut [f32] {
        let at = self.origin() + y * self.row();
        &mut whole[at..at + self.w * self.c]
    }

    /// Zeroes what is around the image.
    pub(crate) fn clear_border(&self, whole: &mut [f32]) {
        if self.plain() {
            return;
        }
        let (row, left, inner) = (self.row(), self.left * self.c, self.w * self.c);
        for (y, line) in whole[..self.len()].chunks_exact_mut(row).enumerate() {
            if (self.top..self.top + self.h).contains(&y) {
                line[..left].fill(0.0);
                line[left + inner..].fill(0.0);
            } else {
                line.fill(0.0);
            }
        }
    }
}

/// A regular walk over pixels: where each reads its taps and where it writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sweep {
    /// Taps as `ky * kw + kx`, in the order of `runs`.
    pub taps: Vec<usize>,
    /// Offsets of the contiguous runs of inputs.
    pub runs: Vec<usize>,
    /// Floats in each run.
    pub run: usize,
    pub rows: usize,
    pub cols: usize,
    /// Floats from one pixel and one row to the next, on the reading side.
    pub in_step: usize,
    pub in_row: usize,
    /// The first pixel and the steps on the writing side.
    pub out: usize,
    pub out_step: usize,
    pub out_row: usize,
}

impl Sweep {
    /// Inputs of each output.
    pub(crate) fn depth(&self) -> usize {
        self.runs.len() * self.run
    }
}

/// One axis of a sweep.
pub(crate) struct Axis {
    /// Positions.
    pub count: usize,
    /// Where the first one writes.
    pub first: usize,
    /// What each reads, relative to its number, and through which kernel index; ascending.
    pub taps: Vec<(isize, usize)>,
}

/// Images of `channels` channels and `cols` columns that a sweep walks over in steps of rows and columns.
#[derive(Clone, Copy)]
pub(crate) struct Walk {
    pub channels: usize,
    pub cols: usize,
    pub step: [usize; 2],
}

impl Axis {
    /// The same for images that begin `by` positions later.
    pub(crate) fn shifted(mut self, by: usize) -> Self {
        self.taps.iter_mut().for_each(|t| t.0 += by as isize);
        self
    }
}

/// Joins two axes to a sweep over the images `from` that writes the images `to`.
pub(crate) fn sweep(y: &Axis, x: &Axis, kw: usize, groups: usize, from: Walk, to: Walk) -> Sweep {
    let row = from.cols * from.channels;
    // Taps that follow one another in memory are one run; channels of other groups would lie between them.
    let joined = groups == 1 && x.taps.windows(2).all(|t| t[1].0 == t[0].0 + 1);
    let per_run = if joined { x.taps.len().max(1) } else { 1 };
    let mut taps = vec![];
    let mut runs = vec![];
    for &(dy, ky) in &y.taps {
        for (i, &(dx, kx)) in x.taps.iter().enumerate() {
            taps.push(ky * kw + kx);
            if i % per_run == 0 {
                runs.push(dy as usize * row + dx as usize * from.channels);
            }
        }
    }
    Sweep {
        taps,
        runs,
        run: per_run * from.channels / groups,
        rows: y.count,
        cols: x.count,
        in_step: from.step[1] * from.channels,
        in_row: from.step[0] * row,
        out: (y.first * to.cols + x.first) * to.channels,
        out_step: to.step[1] * to.channels,
        out_row: to.step[0] * to.cols * to.channels,
    }
}

/// For each residue of the padded position modulo the stride, the inputs that have it: number i of them is reached by output `i + offset`
/// through each tap.
pub(crate) fn residues(n: usize, pad: usize, kernel: usize, stride: usize, dilation: usize) -> Vec<Axis> {
    (0..stride.min(n))
        .map(|first| {
            let (position, stride) = ((first + pad) as isize, stride as isize);
            let reach = |t: usize| position - (t * dilation) as isize;
            let taps = (0..kernel).rev().filter(|&t| reach(t) % stride == 0).map(|t| (reach(t) / stride, t)).collect();
            Axis { count: (n - first).div_ceil(stride as usize), first, taps }
        })
        .collect()
}
