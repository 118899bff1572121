/* Runs a trained network, and prepares drawings for it: what seqmnist/networks and
   seqmnist/study/images.py compute, without the DOM, so that tests can run it.

   Vectors are arrays of numbers. Matrices are {shape: [rows, columns], data}, row after row. */
"use strict";

const sigmoid = (x) => 1 / (1 + Math.exp(-x));
const softplus = (x) => Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x)));
const logSigmoid = (x) => -softplus(-x);
const silu = (x) => x * sigmoid(x);
const gelu = (x) => x * sigmoid(1.5957691216057308 * (x + 0.044715 * x ** 3));
const dot = (a, b) => a.reduce((sum, x, i) => sum + x * b[i], 0);
const vector = (n, at) => Float64Array.from({length: n}, (_, i) => at(i));
const zeros = (n) => new Float64Array(n);

/* x W + b, without b if there is none. */
function affine(x, {shape: [rows, columns], data}, bias) {
  const y = bias ? Float64Array.from(bias.data) : zeros(columns);
  for (let i = 0; i < rows; i++) {
    const factor = x[i], row = i * columns;
    if (factor) for (let j = 0; j < columns; j++) y[j] += factor * data[row + j];
  }
  return y;
}

/* x W + b + h U: what the gates of a cell see. */
function gates(p, x, h) {
  const z = affine(x, p.kernel, p.bias), r = affine(h, p.recurrent_kernel);
  return z.map((value, i) => value + r[i]);
}

/* h_t = f(x W + b + h_{t-1} U) */
function simple(p, size, activation) {
  return {state: [zeros(size)], step: ([h], x) => [gates(p, x, h).map(activation)]};
}

/* h_t = a_t h_{t-1} + b_t; `coefficients` returns [a_t, b_t] of unit i. */
function linear(p, size, coefficients) {
  const step = ([h], x) => {
    const z = affine(x, p.kernel, p.bias);
    return [h.map((value, i) => {
      const [a, b] = coefficients(z, i);
      return a * value + b;
    })];
  };
  return {state: [zeros(size)], step};
}

/* h_t = λ h_{t-1} + factor (x B), complex; y = Re(h C) + x D. A state is [Re h, Im h]. */
function diagonal(p, poles, factors) {
  const n = poles.length, rotate = ([a, b], [c, d]) => [a * c - b * d, a * d + b * c];
  const step = ([re, im], x) => {
    const b = [affine(x, p.B_re), affine(x, p.B_im)], after = [zeros(n), zeros(n)];
    for (let i = 0; i < n; i++) {
      const old = rotate(poles[i], [re[i], im[i]]), add = rotate(factors[i], [b[0][i], b[1][i]]);
      after[0][i] = old[0] + add[0];
      after[1][i] = old[1] + add[1];
    }
    return after;
  };
  const emit = ([re, im], x) => {
    const y = affine(re, p.C_re), minus = affine(im, p.C_im);
    return y.map((value, j) => value - minus[j] + (p.D ? x[j] * p.D.data[j] : 0));
  };
  return {state: [zeros(n), zeros(n)], step, emit};
}

/* exp(a + i b) */
const exponential = (a, b) => [Math.exp(a) * Math.cos(b), Math.exp(a) * Math.sin(b)];

/* (parameters p, hidden size n) -> a cell {state, step, emit}: the state before the first step, a
   list of vectors; (state, x_t) -> the next state; (state, x_t) -> the output, the state's first
   vector if there is no `emit`. Names and equations are those of seqmnist/networks. */
const CELLS = {
  simple_rnn: (p, n) => simple(p, n, Math.tanh),

  irnn: (p, n) => simple(p, n, (x) => Math.max(x, 0)),

  gru: (p, n) => ({
    state: [zeros(n)],
    step: ([h], x) => {
      const z = affine(x, p.kernel, p.bias), r = affine(h, p.recurrent_kernel, p.recurrent_bias);
      return [h.map((old, i) => {
        const update = sigmoid(z[i] + r[i]), reset = sigmoid(z[n + i] + r[n + i]);
        return update * old + (1 - update) * Math.tanh(z[2 * n + i] + reset * r[2 * n + i]);
      })];
    },
  }),

  lstm: (p, n) => ({
    state: [zeros(n), zeros(n)],
    step: ([h, c], x) => {
      const z = gates(p, x, h), gate = (k, i) => sigmoid(z[k * n + i]);
      c = c.map((old, i) => gate(1, i) * old + gate(0, i) * Math.tanh(z[2 * n + i]));
      return [c.map((cell, i) => gate(3, i) * Math.tanh(cell)), c];
    },
  }),

  lem: (p, n) => ({
    state: [zeros(n), zeros(n)],
    step: ([h, slow], x) => {
      const z = affine(x, p.kernel, p.bias), r = affine(h, p.recurrent_kernel);
      const mix = (gate, old, input) => old + sigmoid(gate) * (Math.tanh(input) - old);
      slow = slow.map((old, i) => mix(z[i] + r[i], old, z[2 * n + i] + r[2 * n + i]));
      const v = affine(slow, p.slow_kernel);
      return [h.map((old, i) => mix(z[n + i] + r[n + i], old, z[3 * n + i] + v[i])), slow];
    },
  }),

  slstm: (p, n) => ({
    state: [zeros(n), zeros(n), zeros(n), zeros(n).fill(-1e30)],
    step: ([h, c, norm, m], x) => {
      const z = gates(p, x, h), kept = m.map((old, i) => logSigmoid(z[n + i]) + old);
      m = kept.map((value, i) => Math.max(value, z[i]));
      const input = (i) => Math.exp(z[i] - m[i]), forget = (i) => Math.exp(kept[i] - m[i]);
      c = c.map((old, i) => forget(i) * old + input(i) * Math.tanh(z[2 * n + i]));
      norm = norm.map((old, i) => forget(i) * old + input(i));
      return [c.map((cell, i) => sigmoid(z[3 * n + i]) * cell / norm[i]), c, norm, m];
    },
  }),

  min_gru: (p, n) => linear(p, n, (z, i) => [sigmoid(-z[i]), sigmoid(z[i]) * z[n + i]]),

  min_lstm: (p, n) => linear(p, n, (z, i) => {
    const odds = logSigmoid(z[i]) - logSigmoid(z[n + i]);
    return [sigmoid(odds), sigmoid(-odds) * z[2 * n + i]];
  }),

  rg_lru: (p, n) => linear(p, n, (z, i) => {
    const logA = 8 * sigmoid(z[i]) * logSigmoid(p.Lambda.data[i]);
    return [Math.exp(logA), Math.sqrt(-Math.expm1(2 * logA)) * sigmoid(z[n + i]) * z[2 * n + i]];
  }),

  lru: (p) => {
    const theta = p.theta_log.data;
    const poles = Array.from(p.nu_log.data, (nu, i) => (
      exponential(-Math.exp(nu), Math.exp(theta[i]))));
    return diagonal(p, poles, Array.from(p.gamma_log.data, (gamma) => [Math.exp(gamma), 0]));
  },

  s5: (p) => {
    const steps = Array.from(p.step_log.data, Math.exp);
    const rates = steps.map((_, i) => [-Math.exp(p.decay_log.data[i]), p.frequency.data[i]]);
    const poles = rates.map(([re, im], i) => exponential(re * steps[i], im * steps[i]));
    return diagonal(p, poles, poles.map(([a, b], i) => {  // (exp(λ Δ) - 1) / λ
      const [re, im] = rates[i], size = re * re + im * im;
      return [((a - 1) * re + b * im) / size, (b * re - (a - 1) * im) / size];
    }));
  },

  s6: (p, n) => {
    const [, size] = p.A_log.shape, rates = p.A_log.data.map((log) => -Math.exp(log));
    const project = (x) => {  // u, Δ, B, C
      const z = affine(x, p.kernel), ends = [0, n, 2 * n, 2 * n + size, 2 * n + 2 * size];
      return [0, 1, 2, 3].map((k) => z.subarray(ends[k], ends[k + 1]));
    };
    return {
      state: [zeros(n * size)],
      step: ([h], x) => {
        const [u, z, b] = project(x), dt = z.map((value, i) => softplus(value + p.bias.data[i]));
        return [h.map((old, k) => {
          const i = Math.floor(k / size);
          return Math.exp(dt[i] * rates[k]) * old + dt[i] * u[i] * b[k % size];
        })];
      },
      emit: ([h], x) => {
        const [u, , , c] = project(x);
        const read = (i) => dot(c, h.subarray(i * size, (i + 1) * size));
        return u.map((value, i) => read(i) + value * p.D.data[i]);
      },
    };
  },

  delta_net: (p, n) => {
    const heads = p.bias.data.length - 3 * n, size = n / heads;
    const unit = (x) => x.map((value) => value / Math.sqrt(dot(x, x) + 1e-6));
    return {
      state: [zeros(n), zeros(n * size)],  // h, and S [heads, values, keys]
      step: ([, memory], x) => {
        const z = affine(x, p.kernel, p.bias), h = zeros(n);
        memory = memory.slice();
        for (let m = 0; m < heads; m++) {
          const [q, k, v] = [0, n, 2 * n].map((start) => (
            z.subarray(start + m * size, start + (m + 1) * size).map(silu)));
          const [query, key] = [unit(q), unit(k)], beta = sigmoid(z[3 * n + m]);
          for (let i = 0; i < size; i++) {
            const start = (m * size + i) * size, row = memory.subarray(start, start + size);
            const error = beta * (v[i] - dot(row, key));
            for (let j = 0; j < size; j++) row[j] += error * key[j];
            h[m * size + i] = dot(row, query);
          }
        }
        return [h, memory];
      },
    };
  },
};

/* (what is kept of t outputs, the next one y, t) -> what is kept. */
const READOUTS = {
  last: (kept, y) => y,
  mean: (kept, y, t) => y.map((value, i) => (t ? kept[i] + (value - kept[i]) / (t + 1) : value)),
  max: (kept, y, t) => y.map((value, i) => (t ? Math.max(kept[i], value) : value)),
};

function layerNorm(x, {scale, bias}) {
  const mean = x.reduce((sum, value) => sum + value, 0) / x.length;
  const centred = x.map((value) => value - mean);
  const spread = Math.sqrt(dot(centred, centred) / x.length + 1e-6);
  return centred.map((value, i) => value / spread * scale.data[i] + bias.data[i]);
}

function softmax(x) {
  const largest = Math.max(...x), powers = Array.from(x, (value) => Math.exp(value - largest));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map((power) => power / sum);
}

/* A network from its description, see page.py, and its parameters {name: {shape, data}}. */
function makeNetwork(about, parameters) {
  const tree = {};
  for (const [name, value] of Object.entries(parameters)) {
    const parts = name.split("."), last = parts.pop();
    parts.reduce((branch, part) => (branch[part] ??= {}), tree)[last] = value;
  }
  const cell = (p) => ({emit: ([h]) => h, ...CELLS[about.cell](p, about.hidden_size)});
  const layers = Object.values(tree.layers).map((p) => {
    const own = p.layer ?? p, isBlock = "layer" in p;
    return {
      cells: own.forward ? [cell(own.forward), cell(own.backward)] : [cell(own)],
      prepare: (x) => (isBlock ? layerNorm(x, p.norm) : x),
      finish: (x, y) => {
        if (!isBlock) return y;
        const v = affine(y.map(gelu), p.gate.kernel, p.gate.bias), n = x.length;
        return x.map((value, i) => value + v[i] * sigmoid(v[n + i]));
      },
    };
  });
  return {
    layers,
    isBidirectional: layers[0].cells.length > 1,
    sequence: (image) => about.pixels.map((at) => Float64Array.from(at, (i) => image[i] / 255)),
    encode: (x) => (tree.encoder ? affine(x, tree.encoder.kernel, tree.encoder.bias) : x),
    keep: READOUTS[about.readout],
    answer: (kept) => softmax(affine(kept, tree.readout.kernel, tree.readout.bias)),
  };
}

/* Yields [t, the probabilities if the image ended after t + 1 time steps] for all t: the last
   first if the network reads in both directions, else in order. `image` is bytes. */
function* beliefs(network, image) {
  const sequence = network.sequence(image);
  if (network.isBidirectional) {
    for (let t = sequence.length; t > 0; t--) {
      yield [t - 1, network.answer(readBothWays(network, sequence.slice(0, t)))];
    }
    return;
  }
  const states = network.layers.map(({cells: [cell]}) => cell.state);
  let kept = null;
  for (const [t, x] of sequence.entries()) {
    let y = network.encode(x);
    network.layers.forEach(({cells: [cell], prepare, finish}, i) => {
      const input = prepare(y);
      states[i] = cell.step(states[i], input);
      y = finish(y, cell.emit(states[i], input));
    });
    kept = network.keep(kept, y, t);
    yield [t, network.answer(kept)];
  }
}

/* What the readout keeps of a whole sequence. */
function readBothWays(network, sequence) {
  const read = ({state, step, emit}, xs) => xs.map((x) => emit(state = step(state, x), x));
  const concatenate = (a, b) => Float64Array.of(...a, ...b);
  let ys = sequence.map(network.encode);
  for (const {cells: [forward, backward], prepare, finish} of network.layers) {
    const xs = ys.map(prepare), ahead = read(forward, xs);
    const back = read(backward, xs.reverse()).reverse();
    ys = ys.map((y, t) => finish(y, concatenate(ahead[t], back[t])));
  }
  const half = ys[0].length / 2;  // each in the direction in which its cell reads
  return ys.reduce((kept, y, t) => (
    network.keep(kept, concatenate(y.slice(0, half), ys.at(-1 - t).slice(half)), t)), null);
}

/* Decodes parameters: base64 of zlib's format, of the bytes of all float32 numbers, the most
   significant byte of each first, then the next of each. `shapes` is [[name, shape], …]. */
async function unpack(text, shapes) {
  const packed = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
  const count = bytes.length / 4, words = new Uint32Array(count);
  for (let k = 0; k < 4; k++) {
    for (let i = 0; i < count; i++) words[i] |= bytes[k * count + i] << (24 - 8 * k);
  }
  const all = new Float32Array(words.buffer), parameters = {};
  let start = 0;
  for (const [name, shape] of shapes) {
    const end = start + shape.reduce((a, b) => a * b, 1);
    parameters[name] = {shape, data: all.subarray(start, end)};
    start = end;
  }
  return parameters;
}

/* Draws strokes {width, points: [[x, y], …]}, in pixels, with round ends: ink in 0 to 1. */
function rasterize(strokes, width, height) {
  const ink = new Float32Array(width * height);
  for (const {width: pen, points} of strokes) {
    points.forEach(([x1, y1], k) => {
      const [x0, y0] = points[Math.max(k - 1, 0)], dx = x1 - x0, dy = y1 - y0;
      const square = dx * dx + dy * dy || 1, reach = pen / 2 + 1;
      const last = (a, b, size) => Math.min(Math.ceil(Math.max(a, b) + reach), size);
      const first = (a, b) => Math.max(Math.floor(Math.min(a, b) - reach), 0);
      for (let y = first(y0, y1); y < last(y0, y1, height); y++) {
        for (let x = first(x0, x1); x < last(x0, x1, width); x++) {
          const px = x + 0.5 - x0, py = y + 0.5 - y0;
          const along = Math.min(Math.max((px * dx + py * dy) / square, 0), 1);
          const distance = Math.hypot(px - along * dx, py - along * dy);
          const covered = Math.min(Math.max(pen / 2 + 0.5 - distance, 0), 1);
          ink[y * width + x] = Math.max(ink[y * width + x], covered);
        }
      }
    });
  }
  return ink;
}

/* Resizes bilinearly with anti-aliasing, as Pillow does. */
function resize(image, width, height, newWidth, newHeight) {
  const taps = (size, newSize) => Array.from({length: newSize}, (_, i) => {
    const scale = size / newSize, reach = Math.max(scale, 1), centre = (i + 0.5) * scale;
    const start = Math.max(Math.floor(centre - reach + 0.5), 0);
    const end = Math.min(Math.floor(centre + reach + 0.5), size);
    const weights = vector(end - start, (k) => (
      Math.max(1 - Math.abs(start + k + 0.5 - centre) / reach, 0)));
    const sum = weights.reduce((a, b) => a + b);
    return {start, weights: weights.map((weight) => weight / sum)};
  });
  const narrow = new Float32Array(newWidth * height), small = new Float32Array(newWidth * newHeight);
  taps(width, newWidth).forEach(({start, weights}, x) => {
    for (let y = 0; y < height; y++) {
      const row = y * width + start;
      narrow[y * newWidth + x] = weights.reduce((sum, w, k) => sum + w * image[row + k], 0);
    }
  });
  taps(height, newHeight).forEach(({start, weights}, y) => {
    for (let x = 0; x < newWidth; x++) {
      small[y * newWidth + x] = weights.reduce(
        (sum, w, k) => sum + w * narrow[(start + k) * newWidth + x], 0);
    }
  });
  return small;
}

/* Prepares a drawing as MNIST's digits were, bytes [28 · 28], or returns null if it is empty: its
   bounding box is scaled to 20 pixels, and its centre of mass is moved to the middle. */
function prepareDigit(strokes, width, height) {
  let ink = rasterize(strokes, width, height), box = boundingBox(ink, width, height);
  if (!box) return null;
  const least = 2 * Math.max(box.width, box.height) / 20;  // MNIST's pen was no thinner
  if (strokes.some((stroke) => stroke.width < least)) {
    const wide = strokes.map((each) => ({...each, width: Math.max(each.width, least)}));
    ink = rasterize(wide, width, height);
    box = boundingBox(ink, width, height);
  }
  const part = vector(box.width * box.height, (i) => (
    ink[(box.top + Math.floor(i / box.width)) * width + box.left + i % box.width]));
  const scale = 20 / Math.max(box.width, box.height);
  const [w, h] = [box.width, box.height].map((n) => Math.max(1, Math.round(scale * n)));
  const small = resize(part, box.width, box.height, w, h);
  let mass = 0, right = 0, down = 0;
  small.forEach((value, i) => {
    mass += value; right += value * (i % w); down += value * Math.floor(i / w);
  });
  const place = (centre, n) => Math.min(Math.max(14 - Math.floor(centre + 0.5), 0), 28 - n);
  const left = place(right / mass, w), top = place(down / mass, h), largest = Math.max(...small);
  const image = new Uint8Array(28 * 28);
  small.forEach((value, i) => {
    image[(top + Math.floor(i / w)) * 28 + left + i % w] = Math.round(255 * value / largest);
  });
  return image;
}

/* Where there is ink, {left, top, width, height}, or null. */
function boundingBox(ink, width, height) {
  let [left, top, right, bottom] = [width, height, -1, -1];
  ink.forEach((value, i) => {
    if (value <= 0.2) return;
    const x = i % width, y = Math.floor(i / width);
    [left, right] = [Math.min(left, x), Math.max(right, x)];
    [top, bottom] = [Math.min(top, y), Math.max(bottom, y)];
  });
  return right < 0 ? null : {left, top, width: right - left + 1, height: bottom - top + 1};
}

/* A drawing on a paper of width × height as an image of the network, bytes, or null if it is
   empty. What is not MNIST's digits is resized: light strokes on a dark ground. */
function prepare(about, strokes, width, height) {
  if (!strokes.length) return null;
  if (about.is_of_digits) return prepareDigit(strokes, width, height);
  const ink = rasterize(strokes, width, height);
  const small = resize(ink, width, height, about.width, about.height);
  return Uint8Array.from({length: small.length * about.channels}, (_, i) => (
    Math.round(255 * small[Math.floor(i / about.channels)])));
}
