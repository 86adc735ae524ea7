//! Exchanges of memory on a GPU: through the host, and through NCCL with one rank for each GPU that is there.

use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_core::Device;
use trainer::device::{Buffer, Queue, Ticket, open};
use trainer::ranks::host::OnHost;
use trainer::ranks::local::Threads;
use trainer::ranks::{Exchange, Sum};

use crate::support::random;

const DEADLINE: Duration = Duration::from_secs(60);
/// Values of a shard: no multiple of anything.
const EACH: usize = 10_007;

fn wait(ticket: &Ticket) {
    ticket.wait(Some(Instant::now() + DEADLINE)).unwrap();
}

fn on_device(queue: &Queue, values: &[f32]) -> Arc<Buffer> {
    let mut host = Buffer::host(4 * values.len());
    host.write(0, values).unwrap();
    let buffer = Arc::new(Buffer::device(queue, 4 * values.len()).unwrap());
    wait(&queue.copy(&Arc::new(host).whole(), &buffer.whole(), &Ticket::done()).unwrap());
    buffer
}

fn on_host(queue: &Queue, buffer: &Arc<Buffer>, after: &Ticket) -> Vec<f32> {
    let host = Arc::new(Buffer::host(buffer.len()));
    wait(&queue.copy(&buffer.whole(), &host.whole(), after).unwrap());
    host.with_bytes(|bytes| bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()).unwrap()
}

fn values(rank: usize, count: usize) -> Vec<f32> {
    random(&format!("exchange of rank {rank}"), count)
}

/// What `exchange` makes of every rank's values: the sum, scattered and gathered again in place.
fn reduced(queue: &Queue, rank: usize, world_size: usize, exchange: &dyn Exchange) -> Vec<f32> {
    let own = on_device(queue, &values(rank, EACH * world_size));
    let full = on_device(queue, &vec![f32::NAN; EACH * world_size]);
    let shard = full.part(4 * EACH * rank..4 * EACH * (rank + 1)).unwrap();
    let made = queue.ticket().unwrap();
    let scattered = exchange.reduce_scatter(&own.whole(), &shard, Sum::F32, &made).unwrap();
    // The queue frees it when the exchange is done with it.
    drop(own);
    let gathered = exchange.all_gather(&shard, &full.whole(), &scattered).unwrap();
    let together = exchange.grouped(&mut |group| group.all_gather(&shard, &full.whole(), &gathered).map(drop)).unwrap();
    exchange.check().unwrap();
    on_host(queue, &full, &together)
}

/// Runs every rank in a thread with a GPU from `gpu` and an exchange from `connect`, and compares with plain sums.
fn check<E: Exchange>(
    world_size: usize,
    gpu: impl Fn(usize) -> Device + Sync,
    connect: impl Fn(Threads, &Queue) -> E + Sync,
) {
    let (gpu, connect) = (&gpu, &connect);
    let results: Vec<Vec<f32>> = std::thread::scope(|scope| {
        let ranks = Threads::group(world_size, DEADLINE).unwrap();
        let handles: Vec<_> = (ranks.into_iter().enumerate())
            .map(|(rank, threads)| {
                scope.spawn(move || {
                    let queue = Queue::of(&gpu(rank)).unwrap();
                    reduced(&queue, rank, world_size, &connect(threads, &queue))
                })
            })
            .collect();
        handles.into_iter().map(|handle| handle.join().unwrap()).collect()
    });
    let all: Vec<Vec<f32>> = (0..world_size).map(|rank| values(rank, EACH * world_size)).collect();
    for (rank, result) in results.iter().enumerate() {
        assert_eq!(result.len(), EACH * world_size);
        for (index, got) in result.iter().enumerate() {
            let want: f64 = all.iter().map(|values| f64::from(values[index])).sum();
            assert!((f64::from(*got) - want).abs() <= 1e-5, "value {index} of rank {rank}: {got}, expected {want}");
            assert_eq!(got.to_bits(), results[0][index].to_bits(), "all ranks hold the same bits");
        }
    }
}

#[test]
#[ignore = "gpu"]
fn ranks_of_one_gpu_exchange_through_the_host() {
    for world_size in [1, 3] {
        check(
            world_size,
            |_| open(0).unwrap(),
            |threads, queue| OnHost::over(Arc::new(threads), queue.beside().unwrap()).unwrap(),
        );
    }
}

#[cfg(feature = "nccl")]
#[test]
#[ignore = "gpu"]
fn ranks_with_a_gpu_each_exchange_through_nccl() {
    use trainer::ranks::nccl::Nccl;
    let gpus = (0..8).take_while(|&ordinal| trainer::device::is_cuda_device(ordinal)).count();
    for world_size in 1..=gpus {
        check(
            world_size,
            |rank| open(rank).unwrap(),
            |threads, queue| Nccl::connect(Arc::new(threads), queue, (DEADLINE, true)).unwrap(),
        );
    }
}
