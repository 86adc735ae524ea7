// llama.cpp on a CPU beside `cpu.sh`: tokens/s of prefill and of decoding 1 and 8 sequences.
// Usage: npm i node-llama-cpp@3.22.1 && node llama_cpu.mjs MODEL.gguf [THREADS]   in a folder with this file and the package
import {getLlama} from "node-llama-cpp";

const [path, threads = "2"] = process.argv.slice(2);
const PROMPT = "Write a Python function that reverses a string.";
const llama = await getLlama({gpu: false, maxThreads: Number(threads)});
const model = await llama.loadModel({modelPath: path});
const secs = since => (performance.now() - since) / 1000;

async function decode(sequence, tokens) {
  let count = 0, since = performance.now();
  for await (const _ of sequence.evaluate(model.tokenize(PROMPT), {temperature: 0})) {
    if (count++ === 0) since = performance.now(); // the first comes of the prompt
    if (count > tokens) break;
  }
  return tokens / secs(since);
}

const one = await model.createContext({contextSize: 2048, threads: Number(threads), batchSize: 1024});
const sequence = one.getSequence();
const long = model.tokenize(`${PROMPT} `.repeat(100)).slice(0, 897);
for (let round = 0; round < 3; round++) {
  const since = performance.now();
  await sequence.evaluateWithoutGeneratingNewTokens(long);
  console.log(`prefill of ${long.length}: ${(long.length / secs(since)).toFixed(1)}`);
  await sequence.clearHistory();
  console.log(`decode, 1 sequence: ${(await decode(sequence, 64)).toFixed(1)}`);
  await sequence.clearHistory();
}
await one.dispose();

const eight = await model.createContext({contextSize: 512, threads: Number(threads), batchSize: 512, sequences: 8});
const all = Array.from({length: 8}, () => eight.getSequence());
const since = performance.now();
await Promise.all(all.map(each => decode(each, 64)));
console.log(`decode, 8 sequences, with their prompts: ${((8 * 64) / secs(since)).toFixed(1)}`);
process.exit(0);
