"""The colours of the segmentation hints, as data: 150 classes of ADE20K, 182 of COCO-Stuff, with their names.

Sources. ADE20K: the palette that mmsegmentation and the released annotators share; road (6) and skyscraper (48) have one
colour there, and so here. COCO-Stuff: ids and names of the dataset's labels.txt. Its 182 classes have no published colours
of their own, so they take those with which the released ControlNet v1.1 learned COCO, the 133 of COCO's panoptic task:
80 things and 36 stuff classes keep theirs; 43 classes that the panoptic task joins to 17 (branch, bush, leaves and tree are
"tree-merged") share the joint one; the 23 that it leaves out (11 things that were never annotated, 12 stuff classes) take
PASCAL VOC's colour of their id.
"""

import numpy as np


def _read(table: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Read lines of "label red green blue name" as names and colours (N, 3) uint8."""
    rows = [line.split(" ", 4) for line in table.strip().splitlines()]
    return tuple(row[4] for row in rows), np.array([row[1:4] for row in rows], dtype=np.uint8)


# In order of the labels: wall is 0 as in predictions (the dataset's own files have 1 there, and 0 for no class).
ADE20K_NAMES, ADE20K_COLOURS = _read("""
0 120 120 120 wall
1 180 120 120 building
2 6 230 230 sky
3 80 50 50 floor
4 4 200 3 tree
5 120 120 80 ceiling
6 140 140 140 road
7 204 5 255 bed
8 230 230 230 windowpane
9 4 250 7 grass
10 224 5 255 cabinet
11 235 255 7 sidewalk
12 150 5 61 person
13 120 120 70 earth
14 8 255 51 door
15 255 6 82 table
16 143 255 140 mountain
17 204 255 4 plant
18 255 51 7 curtain
19 204 70 3 chair
20 0 102 200 car
21 61 230 250 water
22 255 6 51 painting
23 11 102 255 sofa
24 255 7 71 shelf
25 255 9 224 house
26 9 7 230 sea
27 220 220 220 mirror
28 255 9 92 rug
29 112 9 255 field
30 8 255 214 armchair
31 7 255 224 seat
32 255 184 6 fence
33 10 255 71 desk
34 255 41 10 rock
35 7 255 255 wardrobe
36 224 255 8 lamp
37 102 8 255 bathtub
38 255 61 6 railing
39 255 194 7 cushion
40 255 122 8 base
41 0 255 20 box
42 255 8 41 column
43 255 5 153 signboard
44 6 51 255 chest of drawers
45 235 12 255 counter
46 160 150 20 sand
47 0 163 255 sink
48 140 140 140 skyscraper
49 250 10 15 fireplace
50 20 255 0 refrigerator
51 31 255 0 grandstand
52 255 31 0 path
53 255 224 0 stairs
54 153 255 0 runway
55 0 0 255 case
56 255 71 0 pool table
57 0 235 255 pillow
58 0 173 255 screen door
59 31 0 255 stairway
60 11 200 200 river
61 255 82 0 bridge
62 0 255 245 bookcase
63 0 61 255 blind
64 0 255 112 coffee table
65 0 255 133 toilet
66 255 0 0 flower
67 255 163 0 book
68 255 102 0 hill
69 194 255 0 bench
70 0 143 255 countertop
71 51 255 0 stove
72 0 82 255 palm
73 0 255 41 kitchen island
74 0 255 173 computer
75 10 0 255 swivel chair
76 173 255 0 boat
77 0 255 153 bar
78 255 92 0 arcade machine
79 255 0 255 hovel
80 255 0 245 bus
81 255 0 102 towel
82 255 173 0 light
83 255 0 20 truck
84 255 184 184 tower
85 0 31 255 chandelier
86 0 255 61 awning
87 0 71 255 streetlight
88 255 0 204 booth
89 0 255 194 television receiver
90 0 255 82 airplane
91 0 10 255 dirt track
92 0 112 255 apparel
93 51 0 255 pole
94 0 194 255 land
95 0 122 255 bannister
96 0 255 163 escalator
97 255 153 0 ottoman
98 0 255 10 bottle
99 255 112 0 buffet
100 143 255 0 poster
101 82 0 255 stage
102 163 255 0 van
103 255 235 0 ship
104 8 184 170 fountain
105 133 0 255 conveyer belt
106 0 255 92 canopy
107 184 0 255 washer
108 255 0 31 plaything
109 0 184 255 swimming pool
110 0 214 255 stool
111 255 0 112 barrel
112 92 255 0 basket
113 0 224 255 waterfall
114 112 224 255 tent
115 70 184 160 bag
116 163 0 255 minibike
117 153 0 255 cradle
118 71 255 0 oven
119 255 0 163 ball
120 255 204 0 food
121 255 0 143 step
122 0 255 235 tank
123 133 255 0 trade name
124 255 0 235 microwave
125 245 0 255 pot
126 255 0 122 animal
127 255 245 0 bicycle
128 10 190 212 lake
129 214 255 0 dishwasher
130 0 204 255 screen
131 20 0 255 blanket
132 255 255 0 sculpture
133 0 153 255 hood
134 0 41 255 sconce
135 0 255 204 vase
136 41 0 255 traffic light
137 41 255 0 tray
138 173 0 255 ashcan
139 0 245 255 fan
140 71 0 255 pier
141 122 0 255 crt screen
142 0 255 184 plate
143 0 92 255 monitor
144 184 255 0 bulletin board
145 0 133 255 shower
146 255 214 0 radiator
147 25 194 194 glass
148 102 255 0 clock
149 92 0 255 flag
""")

# In order of the ids: person is 1, entry 0 of these.
COCO_STUFF_NAMES, COCO_STUFF_COLOURS = _read("""
1 220 20 60 person
2 119 11 32 bicycle
3 0 0 142 car
4 0 0 230 motorcycle
5 106 0 228 airplane
6 0 60 100 bus
7 0 80 100 train
8 0 0 70 truck
9 0 0 192 boat
10 250 170 30 traffic light
11 100 170 30 fire hydrant
12 64 0 128 street sign
13 220 220 0 stop sign
14 175 116 175 parking meter
15 250 0 30 bench
16 165 42 42 bird
17 255 77 255 cat
18 0 226 252 dog
19 182 182 255 horse
20 0 82 0 sheep
21 120 166 157 cow
22 110 76 0 elephant
23 174 57 255 bear
24 199 100 0 zebra
25 72 0 118 giraffe
26 64 192 0 hat
27 255 179 240 backpack
28 0 125 92 umbrella
29 192 64 128 shoe
30 64 192 128 eye glasses
31 209 0 151 handbag
32 188 208 182 tie
33 0 220 176 suitcase
34 255 99 164 frisbee
35 92 0 73 skis
36 133 129 255 snowboard
37 78 180 255 sports ball
38 0 228 0 kite
39 174 255 243 baseball bat
40 45 89 255 baseball glove
41 134 134 103 skateboard
42 145 148 174 surfboard
43 255 208 186 tennis racket
44 197 226 255 bottle
45 192 0 192 plate
46 171 134 1 wine glass
47 109 63 54 cup
48 207 138 255 fork
49 151 0 95 knife
50 9 80 61 spoon
51 84 105 51 bowl
52 74 65 105 banana
53 166 196 102 apple
54 208 195 210 sandwich
55 255 109 65 orange
56 0 143 149 broccoli
57 179 0 194 carrot
58 209 99 106 hot dog
59 5 121 0 pizza
60 227 255 205 donut
61 147 186 208 cake
62 153 69 1 chair
63 3 95 161 couch
64 163 255 0 potted plant
65 119 0 170 bed
66 32 128 0 mirror
67 0 182 199 dining table
68 32 0 128 window
69 160 0 128 desk
70 0 165 120 toilet
71 160 128 128 door
72 183 130 88 tv
73 95 32 0 laptop
74 130 114 135 mouse
75 110 129 133 remote
76 166 74 118 keyboard
77 219 142 185 cell phone
78 79 210 114 microwave
79 178 90 62 oven
80 65 70 15 toaster
81 127 167 115 sink
82 59 105 106 refrigerator
83 160 192 0 blender
84 142 108 45 book
85 196 172 0 clock
86 95 54 80 vase
87 128 76 255 scissors
88 201 57 1 teddy bear
89 246 0 122 hair drier
90 191 162 208 toothbrush
91 224 192 0 hair brush
92 255 255 128 banner
93 147 211 203 blanket
94 107 142 35 branch
95 150 100 100 bridge
96 116 112 0 building-other
97 107 142 35 bush
98 134 199 156 cabinet
99 190 153 153 cage
100 168 171 172 cardboard
101 250 141 255 carpet
102 146 139 141 ceiling-other
103 146 139 141 ceiling-tile
104 96 0 64 cloth
105 224 0 64 clothes
106 70 130 180 clouds
107 146 112 198 counter
108 134 199 156 cupboard
109 210 170 100 curtain
110 209 226 140 desk-stuff
111 208 229 228 dirt
112 92 136 89 door-stuff
113 190 153 153 fence
114 96 36 108 floor-marble
115 96 36 108 floor-other
116 96 96 96 floor-stone
117 96 36 108 floor-tile
118 218 88 184 floor-wood
119 241 129 0 flower
120 70 130 180 fog
121 152 161 64 food-other
122 217 17 255 fruit
123 224 192 64 furniture-other
124 152 251 152 grass
125 124 74 181 gravel
126 96 192 192 ground-other
127 64 170 64 hill
128 70 70 70 house
129 107 142 35 leaves
130 255 228 255 light
131 250 141 255 mat
132 0 32 128 metal
133 154 208 0 mirror-stuff
134 152 251 152 moss
135 64 170 64 mountain
136 208 229 228 mud
137 206 186 171 napkin
138 193 0 92 net
139 206 186 171 paper
140 96 96 96 pavement
141 76 91 113 pillow
142 64 160 128 plant-other
143 192 160 128 plastic
144 255 180 195 platform
145 106 154 176 playingfield
146 190 153 153 railing
147 230 150 140 railroad
148 60 143 255 river
149 128 64 128 road
150 0 114 143 rock
151 92 82 55 roof
152 250 141 255 rug
153 152 161 64 salad
154 254 212 124 sand
155 73 77 174 sea
156 255 160 98 shelf
157 70 130 180 sky-other
158 116 112 0 skyscraper
159 255 255 255 snow
160 0 32 64 solid-other
161 104 84 109 stairs
162 0 114 143 stone
163 152 251 152 straw
164 0 32 192 structural-other
165 209 226 140 table
166 169 164 131 tent
167 128 160 192 textile-other
168 225 199 255 towel
169 107 142 35 tree
170 152 161 64 vegetable
171 137 54 74 wall-brick
172 102 102 156 wall-concrete
173 102 102 156 wall-other
174 102 102 156 wall-panel
175 135 158 223 wall-stone
176 7 246 231 wall-tile
177 107 255 200 wall-wood
178 58 41 149 water-other
179 128 224 64 waterdrops
180 183 121 142 window-blind
181 255 73 97 window-other
182 0 224 192 wood
""")
