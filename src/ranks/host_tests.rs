use std::time::Duration;

use candle_core::Device;

use super::*;
use crate::ranks::local::Threads;
use crate::rng::Stream;

const DEADLINE: Duration = Duration::from_secs(20);

/// Runs `work` on every rank of a group with an exchange and returns the results in their order.
fn on_ranks<T: Send>(world_size: usize, work: impl Fn(usize, &OnHost) -> T + Sync) -> Vec<T> {
    let work = &work;
    std::thread::scope(|scope| {
        let ranks = Threads::group(world_size, DEADLINE).unwrap();
        let handles: Vec<_> = (ranks.into_iter().enumerate())
            .map(|(rank, threads)| scope.spawn(move || work(rank, &exchange(threads))))
            .collect();
        handles.into_iter().map(|handle| handle.join().unwrap()).collect()
    })
}

fn exchange(threads: Threads) -> OnHost {
    OnHost::over(Arc::new(threads), Queue::of(&Device::Cpu).unwrap()).unwrap()
}

fn values(rank: usize, count: usize) -> Vec<f32> {
    let mut stream = Stream::new(4, "exchange", 0, rank as u64);
    (0..count).map(|_| (stream.normal() * 10f64.powf(6.0 * stream.uniform() - 3.0)) as f32).collect()
}

fn buffer(bytes: &[u8]) -> Arc<Buffer> {
    let mut buffer = Buffer::host(bytes.len());
    buffer.write(0, bytes).unwrap();
    Arc::new(buffer)
}

fn bytes_of(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn read(buffer: &Buffer) -> Vec<f32> {
    buffer.with_bytes(|bytes| bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()).unwrap()
}

/// The sum as it is defined: rank 0's values first.
fn ordered_sum(world_size: usize, count: usize) -> Vec<f32> {
    let mut sum = values(0, count);
    for rank in 1..world_size {
        sum.iter_mut().zip(values(rank, count)).for_each(|(s, v)| *s += v);
    }
    sum
}

#[test]
fn sums_are_added_in_the_order_of_the_ranks_and_equal_to_the_bit() {
    for (world_size, each) in [(1, 30), (2, 70_001), (5, 30)] {
        let count = each * world_size;
        let expected = ordered_sum(world_size, count);
        let results = on_ranks(world_size, |rank, exchange| {
            let own = buffer(&bytes_of(&values(rank, count)));
            // The shard is a stretch of what is gathered into.
            let full = buffer(&vec![0; 4 * count]);
            let shard = full.part(4 * each * rank..4 * each * (rank + 1)).unwrap();
            let reduced = exchange.reduce_scatter(&own.whole(), &shard, Sum::F32, &Ticket::done()).unwrap();
            let gathered = exchange.all_gather(&shard, &full.whole(), &reduced).unwrap();
            gathered.wait(None).unwrap();
            read(&full)
        });
        for gathered in results {
            assert_eq!(gathered, expected);
        }
    }
}

#[test]
fn sums_of_16_bits_are_made_in_f32_and_rounded_once() {
    let exact = |rank: usize| [256.0f32, 1.0, 1.0][rank];
    let results = on_ranks(3, |rank, exchange| {
        let [bf, f] = [bf16::from_f32(exact(rank)).to_le_bytes(), f16::from_f32(exact(rank)).to_le_bytes()];
        [(bf, Sum::Bf16), (f, Sum::F16)].map(|(bytes, sum)| {
            let (full, shard) = (buffer(&bytes.repeat(3)), buffer(&[0; 2]));
            let done = exchange.reduce_scatter(&full.whole(), &shard.whole(), sum, &Ticket::done()).unwrap();
            done.wait(None).unwrap();
            shard.with_bytes(<[u8]>::to_vec).unwrap()
        })
    });
    for [bf, f] in results {
        // One after the other in bf16 would stay at 256.
        assert_eq!(bf, bf16::from_f32(258.0).to_le_bytes());
        assert_eq!(f, f16::from_f32(258.0).to_le_bytes());
    }
}

#[test]
fn nobody_waits_but_for_the_ticket() {
    let mut group = Threads::group(2, DEADLINE).unwrap().into_iter().map(exchange);
    let (first, second) = (group.next().unwrap(), group.next().unwrap());
    let own = [buffer(&[1; 4]), buffer(&[2; 4])];
    let full = [buffer(&[0; 8]), buffer(&[0; 8])];
    let (work, made) = Ticket::promise();
    let asked = first.all_gather(&own[0].whole(), &full[0].whole(), &Ticket::done()).unwrap();
    let late = second.all_gather(&own[1].whole(), &full[1].whole(), &made).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert!(!asked.is_done().unwrap() && !late.is_done().unwrap(), "the second rank's shard is not made yet");
    work.done();
    [asked, late].iter().for_each(|ticket| ticket.wait(None).unwrap());
    for full in full {
        assert_eq!(full.with_bytes(<[u8]>::to_vec).unwrap(), [1, 1, 1, 1, 2, 2, 2, 2]);
    }
}

#[test]
fn a_group_is_done_when_all_of_it_is() {
    let results = on_ranks(2, |rank, exchange| {
        let own: Vec<_> = (0..20u8).map(|index| buffer(&[index + 100 * rank as u8])).collect();
        let full: Vec<_> = (0..20).map(|_| buffer(&[0; 2])).collect();
        let ticket = exchange.grouped(&mut |group| {
            own.iter()
                .zip(&full)
                .try_for_each(|(own, full)| group.all_gather(&own.whole(), &full.whole(), &Ticket::done()).map(drop))
        });
        ticket.unwrap().wait(None).unwrap();
        full.iter().map(|full| full.with_bytes(<[u8]>::to_vec).unwrap()).collect::<Vec<_>>()
    });
    for full in results {
        assert!(full.iter().zip(0..).all(|(pair, index)| *pair == [index, index + 100]), "{full:?}");
    }
}

#[test]
fn work_that_fails_gives_its_ticket_up_and_is_explained() {
    let mut group = Threads::group(2, DEADLINE).unwrap();
    drop(group.pop());
    let left = exchange(group.pop().unwrap());
    let (own, full) = (buffer(&[0; 4]), buffer(&[0; 8]));
    let ticket = left.all_gather(&own.whole(), &full.whole(), &Ticket::done()).unwrap();
    assert!(ticket.wait(None).is_err());
    assert!(matches!(left.check(), Err(Error::PeerLost { rank: 0, peer: 1, .. })));
    let again = left.all_gather(&own.whole(), &full.whole(), &Ticket::done());
    assert!(matches!(again, Err(Error::PeerLost { .. })));

    let sizes = on_ranks(2, |rank, exchange| {
        let (own, full) = (buffer(&vec![0; 4 + rank]), buffer(&vec![0; 8 + 2 * rank]));
        let ticket = exchange.all_gather(&own.whole(), &full.whole(), &Ticket::done()).unwrap();
        assert!(ticket.wait(None).is_err());
        exchange.check()
    });
    assert!(sizes.iter().all(|result| matches!(result, Err(Error::Mismatch { .. }))), "{sizes:?}");
}
