//! A block's weights that are not trained: where blocks compute, at rest, or this rank's part of them.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use candle_core::Device;

use super::{Error, Sharing};
use crate::fs::Bytes;
use crate::quant::{Form, Weight};

/// Bytes at a multiple of which a weight begins in the run of a block's bytes.
const ALIGNMENT: usize = 64;

/// Weights by name.
#[derive(Debug)]
pub(super) struct Frozen {
    /// Those that every rank has.
    whole: BTreeMap<String, Weight>,
    cut: Option<Cut>,
}

/// The others, one behind the other in one run of bytes, of which each rank has an equal part.
#[derive(Debug)]
struct Cut {
    forms: BTreeMap<String, Placed>,
    /// This rank's part.
    own: Vec<u8>,
}

#[derive(Debug)]
struct Placed {
    form: Form,
    start: usize,
    kind_name: String,
}

impl Frozen {
    /// Weights where they were loaded.
    pub(super) fn new(weights: BTreeMap<String, Weight>) -> Self {
        Self { whole: weights, cut: None }
    }

    /// Moves all to where they are computed with, one after the other.
    pub(super) fn move_to(&mut self, stays_on_host: &BTreeSet<String>, device: &Device) -> Result<(), Error> {
        for (name, weight) in std::mem::take(&mut self.whole) {
            let weight = placed(&name, weight, stays_on_host, device)?;
            self.whole.insert(name, weight);
        }
        Ok(())
    }

    /// Keeps this rank's part of all weights but the small ones, which go to where they are computed with.
    pub(super) fn cut(
        &mut self,
        sharing: &Sharing,
        stays_on_host: &BTreeSet<String>,
        device: &Device,
    ) -> Result<(), Error> {
        let mut forms = BTreeMap::new();
        let mut all: Vec<u8> = Vec::new();
        for (name, weight) in std::mem::take(&mut self.whole) {
            let count = match &weight {
                Weight::Dense(tensor) => tensor.elem_count(),
                weight => weight.rows() * weight.cols(),
            };
            if !sharing.cuts_values(count) {
                self.whole.insert(name.clone(), placed(&name, weight, stays_on_host, device)?);
                continue;
            }
            let (form, bytes) = weight.take_apart()?;
            let start = all.len().next_multiple_of(ALIGNMENT);
            all.resize(start, 0);
            all.extend(bytes);
            forms.insert(name, Placed { form, start, kind_name: weight.kind_name() });
        }
        if !forms.is_empty() {
            let part = all.len().div_ceil(sharing.world_size());
            all.resize(part * sharing.world_size(), 0);
            let own = all[part * sharing.rank()..part * (sharing.rank() + 1)].to_vec();
            self.cut = Some(Cut { forms, own });
        }
        Ok(())
    }

    /// All weights, ready to compute with on `device` as far as they are cut; the ranks gather them together.
    pub(super) fn all(
        &self,
        sharing: &Sharing,
        stays_on_host: &BTreeSet<String>,
        device: &Device,
    ) -> Result<Cow<'_, BTreeMap<String, Weight>>, Error> {
        let Some(cut) = &self.cut else { return Ok(Cow::Borrowed(&self.whole)) };
        let bytes = cut.gather(sharing)?;
        let mut all = self.whole.clone();
        for (name, at) in &cut.forms {
            all.insert(name.clone(), placed(name, at.weight(&bytes)?, stays_on_host, device)?);
        }
        Ok(Cow::Owned(all))
    }

    /// One of the weights, as [`Self::all`]; `None` if there is none of this name.
    pub(super) fn one(
        &self,
        name: &str,
        sharing: &Sharing,
        stays_on_host: &BTreeSet<String>,
        device: &Device,
    ) -> Result<Option<Weight>, Error> {
        if let Some(weight) = self.whole.get(name) {
            return Ok(Some(weight.clone()));
        }
        let Some((cut, at)) = self.cut.as_ref().and_then(|cut| Some((cut, cut.forms.get(name)?))) else {
            return Ok(None);
        };
        let weight = at.weight(&cut.gather(sharing)?)?;
        Ok(Some(placed(name, weight, stays_on_host, device)?))
    }

    /// How the weight `name` is stored, if it is one of them.
    pub(super) fn kind_name(&self, name: &str) -> Option<String> {
        let cut = || self.cut.as_ref()?.forms.get(name).map(|at| at.kind_name.clone());
        self.whole.get(name).map(Weight::kind_name).or_else(cut)
    }

    /// Bytes on this rank.
    pub(super) fn size_bytes(&self) -> usize {
        let cut = self.cut.as_ref().map_or(0, |cut| cut.own.len());
        self.whole.values().map(Weight::size_bytes).sum::<usize>() + cut
    }
}

impl Cut {
    fn gather(&self, sharing: &Sharing) -> Result<Bytes, Error> {
        let lengths = std::iter::repeat_n(self.own.len(), sharing.world_size());
        Ok(sharing.gather_bytes(&self.own, lengths)?.into())
    }
}

impl Placed {
    fn weight(&self, all: &Bytes) -> Result<Weight, Error> {
        let range = self.start..self.start + self.form.len();
        let part = all.slice(range).unwrap_or_else(|| Bytes::from(Vec::new()));
        Ok(self.form.weight(&part)?)
    }
}

/// The weight where it is computed with.
fn placed(name: &str, weight: Weight, stays_on_host: &BTreeSet<String>, device: &Device) -> Result<Weight, Error> {
    Ok(if stays_on_host.contains(name) { weight.to_pinned(device)? } else { weight.to_device(device)? })
}
