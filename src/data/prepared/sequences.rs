//! The sequences that supervised training draws from: packed now, or read from a prepared file.
//!
//! Body of a record: whether the pieces keep their boundaries, the number of pieces, their lengths, their tokens (all `u32`),
//! and a bit for each token that is learnt.

use std::path::Path;

use super::bytes::{Body, put_numbers};
use super::records::{FileEntry, Kind, RecordFile};
use super::summary::Summary;
use crate::config::settings::PackingStrategy;
use crate::data::Error;
use crate::data::batch::{Batch, collate};
use crate::data::packing::{Bin, Piece, pack, whole};
use crate::data::sft::{SftData, SftExample};
use crate::data::statistics::TokenStatistics;

/// Sequences of one split.
#[derive(Debug)]
pub struct Sequences {
    kept: Kept,
    summary: Summary,
}

#[derive(Debug)]
enum Kept {
    Memory { examples: Vec<SftExample>, bins: Vec<Bin> },
    File(RecordFile),
}

impl Sequences {
    /// Packs examples into sequences of `packing` tokens, or makes each a sequence.
    ///
    /// # Errors
    /// If the length is 0, or no sequence has a token to learn that comes after another one.
    pub fn new(data: SftData, packing: Option<(usize, PackingStrategy)>) -> Result<Self, Error> {
        let lengths: Vec<usize> = data.examples.iter().map(|example| example.input_ids.len()).collect();
        let bins = match packing {
            Some((length, strategy)) => pack(&lengths, length, strategy)?,
            None => whole(&lengths),
        };
        let has_target = |bin: &Bin| collate(&data.examples, [bin]).num_targets() > 0;
        let without_target = bins.iter().filter(|bin| !has_target(bin)).count();
        if without_target == bins.len() {
            return Err(Error::Setting(format!(
                "none of the {} rows has a token to learn that comes after another one in its sequence; check the texts, \
                 `max_length` and the masks (`completion_only_loss`, `assistant_only_loss`)",
                data.num_rows
            )));
        }
        let summary = Summary {
            rows: data.num_rows,
            duplicates: data.duplicates.len(),
            dropped: data.dropped,
            beyond_limit: data.beyond_limit,
            truncated: data.truncated,
            is_conversational: data.is_conversational,
            statistics: TokenStatistics::of(lengths),
            sequences: bins.len(),
            tokens: bins.iter().map(Bin::num_tokens).sum(),
            without_target,
            notes: data.findings.notes(),
        };
        Ok(Self { kept: Kept::Memory { examples: data.examples, bins }, summary })
    }

    /// Opens a prepared file.
    ///
    /// # Errors
    /// If it is damaged or another one.
    pub(super) fn open(folder: &Path, entry: &FileEntry, summary: Summary) -> Result<Self, Error> {
        let file = RecordFile::open_entry(folder, entry, Kind::Sequences)?;
        Ok(Self { kept: Kept::File(file), summary })
    }

    /// What became of the rows.
    pub fn summary(&self) -> &Summary {
        &self.summary
    }

    /// Number of sequences.
    pub fn len(&self) -> usize {
        match &self.kept {
            Kept::Memory { bins, .. } => bins.len(),
            Kept::File(file) => file.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Some of them as one ragged batch.
    ///
    /// # Errors
    /// If a record cannot be read or is damaged.
    pub fn collate(&self, indices: &[usize]) -> Result<Batch, Error> {
        match &self.kept {
            Kept::Memory { examples, bins } => Ok(collate(examples, indices.iter().map(|&index| &bins[index]))),
            Kept::File(file) => {
                let (mut examples, mut bins) = (Vec::new(), Vec::new());
                for (place, &index) in indices.iter().enumerate() {
                    let body = file.read(index)?;
                    let (example, bin) = decode(&body, place).ok_or_else(|| file.damaged(index))?;
                    examples.push(example);
                    bins.push(bin);
                }
                Ok(collate(&examples, &bins))
            }
        }
    }

    /// Puts the record of a sequence into `body`.
    ///
    /// # Errors
    /// If it has to be read, and cannot be.
    pub(super) fn put(&self, index: usize, body: &mut Vec<u8>) -> Result<(), Error> {
        match &self.kept {
            Kept::Memory { examples, bins } => encode(examples, &bins[index], body),
            Kept::File(file) => body.extend_from_slice(&file.read(index)?),
        }
        Ok(())
    }
}

fn encode(examples: &[SftExample], bin: &Bin, body: &mut Vec<u8>) {
    put_numbers(body, &[u32::from(bin.keeps_boundaries), bin.pieces.len() as u32]);
    bin.pieces.iter().for_each(|piece| put_numbers(body, &[piece.range.len() as u32]));
    for Piece { example, range } in &bin.pieces {
        put_numbers(body, &examples[*example].input_ids[range.clone()]);
    }
    let learnt = bin.pieces.iter().flat_map(|piece| &examples[piece.example].labels_mask[piece.range.clone()]);
    let mut bits = vec![0u8; bin.num_tokens().div_ceil(8)];
    for (token, _) in learnt.enumerate().filter(|(_, is_learnt)| **is_learnt) {
        bits[token / 8] |= 1 << (token % 8);
    }
    body.extend(bits);
}

/// The sequence of a record, as the pieces of one example that is to be number `example`; `None` if it is no such record.
fn decode(body: &[u8], example: usize) -> Option<(SftExample, Bin)> {
    let mut body = Body(body);
    let (keeps_boundaries, pieces) = (body.number()?, body.number()?);
    let mut start = 0usize;
    let mut cut = |length: u32| {
        let range = start..start.checked_add(length as usize)?;
        start = range.end;
        Some(Piece { example, range })
    };
    let pieces: Vec<Piece> = body.numbers(pieces as usize)?.into_iter().map(&mut cut).collect::<Option<_>>()?;
    let input_ids = body.numbers(start)?;
    let bits = body.take(start.div_ceil(8))?;
    let labels_mask = (0..start).map(|token| bits[token / 8] >> (token % 8) & 1 == 1).collect();
    let bin = Bin { pieces, keeps_boundaries: keeps_boundaries == 1 };
    (body.0.is_empty() && keeps_boundaries <= 1).then_some((SftExample { input_ids, labels_mask }, bin))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::prepared::records::RecordWriter;
    use proptest::prelude::*;

    fn example() -> impl Strategy<Value = SftExample> {
        prop::collection::vec((any::<u32>(), any::<bool>()), 1..20)
            .prop_map(|tokens| tokens.into_iter().unzip())
            .prop_map(|(input_ids, labels_mask)| SftExample { input_ids, labels_mask })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn batches_of_a_file_are_those_of_memory(
            examples in prop::collection::vec(example(), 1..12),
            packing in prop::option::of((1usize..24, prop::sample::select(vec![
                PackingStrategy::Bfd, PackingStrategy::BfdSplit, PackingStrategy::Wrapped,
            ]))),
            picks in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
        ) {
            let data = SftData { num_rows: examples.len(), examples, ..SftData::default() };
            let Ok(memory) = Sequences::new(data, packing) else { return Ok(()) };
            let folder = tempfile::tempdir().unwrap();
            let mut writer = RecordWriter::create(&folder.path().join("train.bin"), Kind::Sequences).unwrap();
            for index in 0..memory.len() {
                let mut body = Vec::new();
                memory.put(index, &mut body).unwrap();
                writer.push(&body).unwrap();
                prop_assert!(decode(&body[..body.len() - 1], 0).is_none());
            }
            let entry = writer.finish().unwrap();
            let file = Sequences::open(folder.path(), &entry, memory.summary().clone()).unwrap();
            prop_assert_eq!(file.len(), memory.len());
            let picks: Vec<usize> = picks.iter().map(|pick| pick.index(memory.len())).collect();
            prop_assert_eq!(file.collate(&picks).unwrap(), memory.collate(&picks).unwrap());
        }

        #[test]
        fn no_body_makes_a_panic_or_a_large_allocation(body in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = decode(&body, 0);
        }
    }
}
