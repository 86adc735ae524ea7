use std::io::Write as _;
use std::time::Instant;

use super::*;

const DEADLINE: Duration = Duration::from_secs(20);

fn meeting(rank: usize, world_size: usize, port: u16, deadline: Duration) -> Meeting {
    Meeting { rank, world_size, address: ("127.0.0.1".into(), port), host: format!("node{rank}"), deadline }
}

/// Runs `work` on every rank of a group and returns the results in their order.
fn on_ranks<T: Send>(world_size: usize, deadline: Duration, work: impl Fn(Tcp) -> T + Sync) -> Vec<T> {
    let (port, work) = (free_port().unwrap(), &work);
    std::thread::scope(|scope| {
        let rank = |rank| scope.spawn(move || work(connect(&meeting(rank, world_size, port, deadline)).unwrap()));
        let handles: Vec<_> = (0..world_size).map(rank).collect();
        handles.into_iter().map(|handle| handle.join().unwrap()).collect()
    })
}

#[test]
fn collectives_give_what_threads_give() {
    for world_size in [2, 3, 5] {
        let results = on_ranks(world_size, DEADLINE, |ranks| {
            let own = ranks.rank();
            let gathered = ranks.all_gather_bytes(&vec![own as u8; own * 100_000]).unwrap();
            let mut message = if own == 1 { b"from one".to_vec() } else { b"?".to_vec() };
            ranks.broadcast(&mut message, 1).unwrap();
            let parts = (0..world_size).map(|to| vec![(10 * own + to) as u8; to + 1]).collect();
            let swapped = ranks.all_to_all_bytes(parts).unwrap();
            let mut sums = [10f64.powi(own as i32), 0.1];
            ranks.all_reduce_sum_f64(&mut sums).unwrap();
            ranks.barrier().unwrap();
            (gathered, message, swapped, sums)
        });
        for (own, (gathered, message, swapped, sums)) in results.into_iter().enumerate() {
            assert!(gathered.iter().enumerate().all(|(r, bytes)| *bytes == vec![r as u8; r * 100_000]));
            assert_eq!(message, b"from one");
            let expected: Vec<Vec<u8>> = (0..world_size).map(|from| vec![(10 * from + own) as u8; own + 1]).collect();
            assert_eq!(swapped, expected);
            assert_eq!(sums[1], (0..world_size).map(|_| 0.1).fold(0.0, |sum, v| sum + v));
        }
    }
}

#[test]
fn many_rounds_in_a_row_do_not_mix() {
    let sums = on_ranks(4, DEADLINE, |ranks| {
        (0..300).map(|round| ranks.sum_of_counts(round * (ranks.rank() + 1)).unwrap()).collect::<Vec<_>>()
    });
    assert!(sums.iter().all(|sums| sums.iter().enumerate().all(|(round, &sum)| sum == round * 10)));
}

#[test]
fn a_rank_that_ends_is_lost_to_the_others_at_once_and_named_with_its_host() {
    let started = Instant::now();
    let results = on_ranks(3, Duration::from_secs(600), |ranks| {
        ranks.barrier().unwrap();
        if ranks.rank() == 2 { Ok(()) } else { ranks.all_gather_bytes(b"x").map(drop) }
    });
    assert!(results[2].is_ok());
    let lost = |rank, peer| {
        let host = format!("node{peer}");
        Err(Error::PeerLost { rank, peer, host, operation: "all_gather_bytes" })
    };
    // Whoever of the two notices first leaves too.
    assert!(results[0] == lost(0, 2) || results[1] == lost(1, 2), "{results:?}");
    assert!(results[..2].iter().all(|result| matches!(result, Err(Error::PeerLost { .. }))), "{results:?}");
    assert!(started.elapsed() < Duration::from_secs(60));
}

#[test]
fn the_reason_of_a_failure_reaches_the_others() {
    let results = on_ranks(3, DEADLINE, |ranks| {
        if ranks.rank() == 1 {
            ranks.abandon("its disk is full");
            Ok(())
        } else {
            ranks.barrier()
        }
    });
    for result in [&results[0], &results[2]] {
        let error = result.clone().unwrap_err();
        assert!(error.is_of_peer());
        let text = error.to_string();
        assert!(text.contains("rank 1 (on node1) failed") && text.contains("its disk is full"), "{text}");
    }
}

#[test]
fn a_rank_that_does_not_come_is_named_at_the_deadline() {
    let results = on_ranks(3, Duration::from_millis(1500), |ranks| {
        if ranks.rank() == 2 {
            // It lives and computes: what it shows of itself is not enough.
            std::thread::sleep(Duration::from_secs(4));
            return Ok(());
        }
        let result = ranks.barrier();
        std::thread::sleep(Duration::from_secs(3));
        result
    });
    for (rank, result) in results[..2].iter().enumerate() {
        let (missing, hosts) = (vec![2], vec!["node2".to_string()]);
        assert_eq!(*result, Err(Error::Timeout { rank, operation: "barrier", secs: 1, missing, hosts }));
    }
}

#[test]
fn work_that_one_rank_leaves_all_leave_and_begin_anew() {
    let results = on_ranks(3, DEADLINE, |ranks| {
        let mut sums = Vec::new();
        for round in 0..20 {
            // A different rank leaves each time, before its share of the second collective.
            ranks.all_gather_bytes(&vec![0; 1000]).unwrap();
            if ranks.rank() == round % 3 {
                ranks.start_over().unwrap();
            } else {
                let left = ranks.all_to_all_bytes(vec![vec![1; 100_000]; 3]).unwrap_err();
                assert!(matches!(left, Error::StartOver { .. }), "{left}");
                ranks.start_over().unwrap();
            }
            sums.push(ranks.sum_of_counts(ranks.rank() + round).unwrap());
        }
        sums
    });
    assert!(results.iter().all(|sums| sums.iter().enumerate().all(|(round, &sum)| sum == 3 + 3 * round)));
}

#[test]
fn each_turn_goes_to_one_rank_while_the_first_is_busy() {
    let started = Instant::now();
    let results = on_ranks(3, DEADLINE, |ranks| {
        let take = |count: u64| (0..count).map(|n| ranks.next_turn(n).unwrap()).collect::<Vec<_>>();
        let mut all = Vec::new();
        for round in 0..10 {
            // The first rank computes meanwhile, and asks too when it is done.
            if ranks.rank() == 0 {
                std::thread::sleep(TICK);
            }
            all.push(take(ranks.rank() as u64 + round));
            ranks.barrier().unwrap();
        }
        all
    });
    for round in 0..10 {
        let mut numbers: Vec<u64> = results.iter().flat_map(|all| all[round].clone()).collect();
        numbers.sort_unstable();
        assert_eq!(numbers, (0..3 + 3 * round as u64).collect::<Vec<_>>());
    }
    assert!(started.elapsed() < Duration::from_secs(15));
}

#[test]
fn turns_begin_anew_after_each_collective_and_none_is_left_for_who_asks_late() {
    let mut turns = Turns::default();
    let mut number = |after| turns.next(after).number;
    assert_eq!(
        [(0, 0), (0, 0), (0, 3), (0, 3), (0, 1), (1, 0), (0, 9), (1, 0)].map(&mut number),
        [0, 1, 0, 1, u64::MAX, 0, u64::MAX, 1]
    );
}

#[test]
fn who_asks_for_a_turn_hears_that_the_work_was_left_or_the_first_rank_is_gone() {
    let results = on_ranks(3, DEADLINE, |ranks| {
        let mut taken = Vec::new();
        for round in 0..6 {
            ranks.barrier().unwrap();
            if ranks.rank() == round % 3 {
                ranks.start_over().unwrap();
            } else {
                // It decodes, and asks between groups.
                let left = loop {
                    match ranks.next_turn(0) {
                        Ok(_) => std::thread::sleep(Duration::from_millis(1)),
                        Err(error) => break error,
                    }
                };
                assert!(matches!(left, Error::StartOver { operation: "next_turn", .. }), "{left}");
                ranks.start_over().unwrap();
            }
            taken.push(ranks.next_turn(0).unwrap());
        }
        ranks.barrier().unwrap();
        if ranks.rank() == 0 {
            return (taken, Ok(0));
        }
        let lost = loop {
            match ranks.next_turn(0) {
                Ok(_) => std::thread::sleep(Duration::from_millis(1)),
                lost => break lost,
            }
        };
        (taken, lost)
    });
    for round in 0..6 {
        let mut numbers: Vec<u64> = results.iter().map(|(taken, _)| taken[round]).collect();
        numbers.sort_unstable();
        assert_eq!(numbers, [0, 1, 2], "they begin anew");
    }
    for (_, lost) in &results[1..] {
        assert!(matches!(lost, Err(Error::PeerLost { peer: 0, operation: "next_turn", .. })), "{lost:?}");
    }
}

#[test]
fn ranks_in_different_collectives_find_out() {
    let results = on_ranks(2, DEADLINE, |ranks| {
        let result = if ranks.rank() == 0 { ranks.barrier() } else { ranks.all_gather_bytes(b"xy").map(drop) };
        std::thread::sleep(Duration::from_millis(300));
        result
    });
    let error = results[0].clone().unwrap_err();
    assert!(error.to_string().contains("`all_gather_bytes`"), "{error}");
    assert!(matches!(results[1], Err(Error::Mismatch { rank: 1, peer: 0, .. })));
}

#[test]
fn who_is_missing_or_there_twice_at_the_meeting_is_named() {
    let port = free_port().unwrap();
    let short = Duration::from_millis(800);
    let alone = connect(&meeting(0, 3, port, short)).unwrap_err();
    assert!(alone.to_string().contains("ranks 1, 2 did not come"), "{alone}");
    let nobody = connect(&meeting(1, 3, port, short)).unwrap_err();
    assert!(nobody.to_string().contains("rank 0 was not reached"), "{nobody}");
    let twice = std::thread::scope(|scope| {
        let ranks = [0, 1, 1].map(|rank| scope.spawn(move || connect(&meeting(rank, 3, port, DEADLINE))));
        ranks.map(|rank| rank.join().unwrap().unwrap_err().to_string())
    });
    assert!(twice.iter().any(|text| text.contains("rank 1 was started twice")), "{twice:?}");
}

#[test]
fn strangers_at_the_meeting_are_let_go() {
    let port = free_port().unwrap();
    std::thread::scope(|scope| {
        let first = scope.spawn(move || connect(&meeting(0, 2, port, DEADLINE)));
        let stranger = scope.spawn(move || {
            let until = Instant::now() + DEADLINE;
            while Instant::now() < until {
                if let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) {
                    return stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
                }
            }
        });
        stranger.join().unwrap();
        let second = scope.spawn(move || connect(&meeting(1, 2, port, DEADLINE)));
        assert!(first.join().unwrap().is_ok() && second.join().unwrap().is_ok());
    });
}
