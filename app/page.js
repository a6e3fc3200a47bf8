/* What gradio's components leave to the page: marks in the prompt's box, keys, a dropped picture, what comes back. */
(() => {
const $ = selector => document.querySelector(selector);
const box = () => $('#prompt textarea');

/* -------------------------------------------------------- the box: what is not read is marked behind its letters */
let cuts = [], marked = '';

function mark() {
  const area = box();
  if (!area) return;
  let layer = area.parentElement.querySelector('.marks');
  if (!layer) {
    layer = document.createElement('div');
    layer.className = 'marks';
    layer.setAttribute('aria-hidden', 'true');
    area.parentElement.prepend(layer);
    area.addEventListener('scroll', () => { layer.scrollTop = area.scrollTop; });
    new ResizeObserver(mark).observe(area);
  }
  const style = getComputedStyle(area);
  for (const name of ['font', 'letterSpacing', 'padding', 'borderWidth', 'lineHeight', 'tabSize', 'textAlign']) layer.style[name] = style[name];
  Object.assign(layer.style, { width: `${area.clientWidth + 2 * area.clientLeft}px`, height: `${area.offsetHeight}px`,
    left: `${area.offsetLeft}px`, top: `${area.offsetTop}px` });
  const text = area.value, starts = cuts.filter(([at]) => at < text.length);
  const parts = [document.createTextNode(text.slice(0, starts[0]?.[0]))];
  starts.forEach(([at, kind], index) => {
    const span = document.createElement('span');
    span.className = kind;
    span.textContent = text.slice(at, starts[index + 1]?.[0]);
    parts.push(span);
  });
  layer.replaceChildren(...parts, document.createTextNode('\u200b'));
  layer.scrollTop = area.scrollTop;
  marked = text;
}

/* Until the server has counted again, marks move with the letters. */
function shift() {
  const text = box().value;
  let same = 0;
  while (same < text.length && same < marked.length && text[same] === marked[same]) same++;
  cuts = cuts.map(([at, kind]) => [at > same ? Math.max(same, at + text.length - marked.length) : at, kind]);
  mark();
  showWhose();
}

function counted() {
  const meter = $('#meter [data-cuts]');
  cuts = meter ? JSON.parse(meter.dataset.cuts) : [];
  mark();
  showWhose();
}

/* ------------------------------------------------------ the example: typing replaces it; it says whose pictures they are */
function showWhose() {
  const example = $('.result[data-example]');
  if (example) example.classList.toggle('not-yours', box().value.trim() !== example.dataset.example);
}

let touched = false;
document.addEventListener('focusin', event => {
  if (event.target !== box() || touched) return;
  touched = true;
  const example = $('.result[data-example]');
  if (example && box().value.trim() === example.dataset.example) setTimeout(() => box().select());
});

document.addEventListener('input', event => { if (event.target === box()) shift(); });
new MutationObserver(list => {
  if (list.some(item => item.target.parentElement?.closest('#meter') || item.target.id === 'meter' || item.target.closest?.('#meter'))) counted();
}).observe(document, { subtree: true, childList: true, characterData: true, attributes: true, attributeFilter: ['data-cuts'] });

/* A message of gradio is a button with a button in it, which nobody can tell apart by ear. */
new MutationObserver(() => {
  for (const head of document.querySelectorAll('.toast-header[role]')) {
    head.removeAttribute('role');
    head.removeAttribute('tabindex');
  }
}).observe(document, { subtree: true, childList: true });

/* ---------------------------------------------------------------------------------------------------------- keys */
document.addEventListener('keydown', event => {
  if ((event.ctrlKey || event.metaKey) && event.key === 'Enter') {
    event.preventDefault();
    $('#compare').click();
  }
  const list = event.target.closest?.('[role=tablist]');
  const step = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
  if (!list || !step) return;
  const tabs = [...list.querySelectorAll('[role=tab]')], last = tabs.length - 1, now = tabs.indexOf(event.target);
  const next = Math.abs(step) === 1 ? (now + step + tabs.length) % tabs.length : step > 0 ? last : 0;
  event.preventDefault();
  tabs[next].click();
  tabs[next].focus();
});

/* ---------------------------------------------------------------------------- a picture that is dropped on the prompt */
for (const name of ['dragover', 'drop', 'dragleave']) {
  document.addEventListener(name, event => {
    const target = event.target.closest?.('#prompt');
    target?.classList.toggle('dropping', name === 'dragover');
    if (!target || !event.dataTransfer?.types.includes('Files')) return;
    event.preventDefault();
    event.stopPropagation();
    if (name !== 'drop') return;
    const input = $('input[type=file]');
    const files = new DataTransfer();
    files.items.add(event.dataTransfer.files[0]);
    input.files = files.files;
    input.dispatchEvent(new Event('change', { bubbles: true }));
  }, true);
}

/* ------------------------------------------------------------------------------------------- drawing, and what comes back */
let entered = false, running = 0;

function remember(state, values) {
  return entered ? { ...state, values } : state;
}

function begin(kind) {
  const results = $('#results'), { top } = results.getBoundingClientRect();
  const calm = matchMedia('(prefers-reduced-motion: reduce)').matches;
  const tab = results.querySelector('[role=tab]');
  if (tab.getAttribute('aria-selected') !== 'true') tab.click();
  if (top < 0 || top > innerHeight / 2) results.scrollIntoView({ behavior: calm ? 'auto' : 'smooth' });
  running++;
  sessionStorage.setItem('finelip-drawing', kind);
}

function end() {
  if (!--running) sessionStorage.removeItem('finelip-drawing');
}

/* A tab is left, perhaps because a server that was away is back, and gradio loads its page again: to the letter. */
addEventListener('pagehide', () => {
  const area = box(), at = document.activeElement === area ? [area.selectionStart, area.selectionEnd] : null;
  if (entered) sessionStorage.setItem('finelip-typing', JSON.stringify({ text: area.value, at }));
});

/* Gradio ends its streams itself when a page is left, and tells the console of it as if these were errors. */
const tell = console.error;
let leaving = false;
console.error = (...words) => {
  leaving ||= words[0]?.name === 'AbortError';
  if (!leaving || !/AbortError|Connection errored out/.test(words.join(' '))) tell(...words);
};

/* The page has been opened. What this tab was drawing is drawn again: the same noise gives the same picture. */
function goOn() {
  entered = true;
  const { text, at } = JSON.parse(sessionStorage.getItem('finelip-typing')) ?? {}, area = box();
  const drawing = sessionStorage.getItem('finelip-drawing');
  if (location.hash) history.replaceState(null, '', location.pathname + location.search);
  else if (text !== undefined && text !== area.value) {
    area.value = text;
    area.dispatchEvent(new Event('input', { bubbles: true }));
  }
  if (at && document.activeElement === document.body) {
    touched = true;
    area.focus({ preventScroll: true });
    area.setSelectionRange(...at);
  }
  if (drawing) setTimeout(() => $(`#${drawing}`).click(), 300);
}

async function copyLink(names, values) {
  const query = new URLSearchParams();
  names.forEach((name, index) => { if (values[index] !== null && values[index] !== '') query.set(name, values[index]); });
  const link = `${location.origin}${location.pathname}#${query}`;
  try {
    await navigator.clipboard.writeText(link);
    return '<p class="note" role="status">The link is copied. It holds the prompt and all settings.</p>';
  } catch {
    const field = document.createElement('input');
    field.setAttribute('value', link);
    field.setAttribute('aria-label', 'Link to this prompt and its settings');
    field.readOnly = true;
    return `<p class="note" role="status">This browser lets nobody copy here. Take the link from this box:</p>${field.outerHTML}`;
  }
}

window.page = { remember, begin, end, goOn, copyLink, entered: () => entered };
})();
